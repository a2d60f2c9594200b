"""Language models on recurrent nets: fast.ai's chapter 12, "A language model from scratch".

Needs the packages of the extra ``text``: ``pip install lstmx[text]``.
"""
