#!/usr/bin/env python3
"""Puts what `engine bench kernels` prints into engine/kernels/README.md: engine bench kernels | kernels_table.py.

Replaces what stands between the two marks there.
"""

import pathlib
import sys

README = pathlib.Path(__file__).resolve().parent.parent / "engine/kernels/README.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def main():
    printed = sys.stdin.read().strip()
    if not printed:
        sys.exit("nothing was printed: the README stays as it is")
    before, rest = README.read_text().split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{printed}\n{END}{after}")


if __name__ == "__main__":
    main()
