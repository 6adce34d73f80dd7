"""Calls every operator of the library with random and hostile arguments, which are derived from its schema.

A case is a small program in plain text: it makes the arguments, calls an operator and maybe its backward. It follows
from a seed and a number alone. It may raise a clean exception or return; it may not crash, hang, trip a sanitizer or
raise an internal assertion, and where its operands are ordinary its answer must be right.

    schemas.py    the operators, and a TorchScript function for each
    draw.py       random choices
    tensors.py    the lines that make a tensor of ordinary kind
    hostile.py    the lines that spoil one
    scalars.py    values for arguments that are no tensors
    cases.py      the program of a case
    answers.py    what the public operators should return
    helpers.py    what a program may use beside torch
    execute.py    runs a program and judges what comes of it
    server.py     runs many, each batch in a process of its own that may die
    shrink.py     makes a program that fails smaller
    __main__.py   the command line
"""
