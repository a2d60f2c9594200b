"""``python -m lstmx``: what is installed and what it would do; needs nothing but torch."""

import argparse

from lstmx.diagnostics import Shape, describe


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lstmx", description=describe.__doc__)
    parser.add_argument("--shape", type=Shape.parse, action="append", metavar="T,B,I,H")
    print(describe(parser.parse_args().shape or []))


if __name__ == "__main__":
    main()
