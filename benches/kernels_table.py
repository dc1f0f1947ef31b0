#!/usr/bin/env python3
"""Puts the figures of `engine bench kernels --json FILE` into engine/kernels/README.md: kernels_table.py FILE.

Replaces what stands between the two marks there.
"""

import json
import pathlib
import sys

README = pathlib.Path(__file__).resolve().parent.parent / "engine/kernels/README.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def main():
    results = json.loads(pathlib.Path(sys.argv[1]).read_text())
    machine = results["machine"]
    peak = machine["multiply_flops"]
    peak = f"{peak / 1e9:.0f} GFLOP/s" if peak else "multiplications not measured"
    lines = [f"{machine['processor']}, {machine['cores']} cores, {machine['kernels']} kernels, {machine['threads']} threads, "
             f"{machine['dtype']}: {peak}, {machine['read_bytes_per_second'] / 1e9:.1f} GB/s. Medians.", ""]
    threads = any(row["one_thread_s"] for row in results["operations"])
    lines.append("| operation | model | shape | MB | GFLOP | limit ms | measured ms | share |" + (" threads |" if threads else ""))
    lines.append("|---|---|---|--:|--:|--:|--:|--:|" + ("--:|" if threads else ""))
    for row in results["operations"]:
        line = (f"| {row['operation']} | {row['model']} | {row['shape']} | {row['bytes'] / 1e6:.2f} | {row['flop'] / 1e9:.3f} "
                f"| {1e3 * row['limit_s']:.3f} | {1e3 * row['seconds']:.3f} | {100 * row['share_of_limit']:.0f} % |")
        if threads:
            line += f" {row['threads_speedup']:.2f} x |"
        lines.append(line)
    text = README.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}")


if __name__ == "__main__":
    main()
