"""Times the cases of tests/cases.py on several providers: ``python -m benchmarks``."""
