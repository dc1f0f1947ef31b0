#!/usr/bin/env python3
"""Loads `engine serve` and compares it with generation without a server.

    benches/serve_load.py MODEL [--clients 1,16,64,256] [--duration 600] [--idle 1000] [--repeats 5]
    benches/serve_load.py --tiny            a few seconds on builtin:arith: a test that the plumbing works

For each number of clients, --repeats times: `engine bench throughput` generates for as many prompts at
once, then `engine bench serve` sends as many requests at once to a server, with other prompts of the same
lengths. Each pair has a share, the rate of the second beside the first, since a machine that others use too
changes its speed from one minute to the next; rates and shares are reported as medians.
Then the soak: the largest number of clients for --duration seconds beside --idle connections that say
nothing, with the server's resident memory over time.

Writes benches/record/MACHINE/DATE-serve.csv, DATE-serve.md (a table) and DATE-serve-memory.csv. Ends with 1
when a request failed or an idle connection was closed. Needs Python 3.11 and nothing else. Quote only what
was recorded with nothing else running.
"""

import argparse
import csv
import datetime
import json
import pathlib
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import run

COLUMNS = ["date", "machine", "commit", "model", "job", "clients", "input_tokens", "output_tokens", "runs",
           "offline_tok_s", "serve_tok_s", "serve_low_tok_s", "serve_high_tok_s", "ratio", "ratio_low", "ratio_high",
           "requests", "failed",
           "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms", "seconds", "idle_opened", "idle_held",
           "rss_first_mib", "rss_peak_mib", "rss_last_mib", "rss_growth_mib", "command"]
GOAL = 0.95
"""Least share of the offline rate."""
FLAT = 0.02
"""Largest growth of the memory that counts as flat, as a share of it."""
MIB = 1 << 20
KV = ["--kv-cache-memory-bytes", "2G"]
"""Of a server and of generation without one: all of it has been used, and so is resident, early in the soak."""


def main():
    args = arguments()
    raise_file_limit()
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H%M")
    base = {"date": stamp, "machine": args.machine or run.machine(), "commit": run.commit(),
            "model": run.name_of(args.model), "input_tokens": args.input_len, "output_tokens": args.output_len}
    rows = []
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        for clients in args.clients:
            with Server(args, work) as server:
                rows.append({**base, **compare(args, work, server, clients)})
            show(rows[-1])
        with Server(args, work) as server:
            soaked, looks = soak(args, work, server)
        rows.append({**base, **soaked})
        show(rows[-1])
    folder = pathlib.Path(args.output) / base["machine"]
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / f"{stamp}-serve.csv", COLUMNS, rows)
    write_csv(folder / f"{stamp}-serve-memory.csv", ["seconds", "rss_bytes"],
              [{"seconds": f"{seconds:.1f}", "rss_bytes": rss} for seconds, rss in looks])
    (folder / f"{stamp}-serve.md").write_text(table(rows))
    print(folder / f"{stamp}-serve.md")
    broken = [row for row in rows if row["failed"] or row.get("idle_held", 0) != row.get("idle_opened", 0)]
    return 1 if broken else 0


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="builtin:arith", help="[default: builtin:arith]")
    parser.add_argument("--clients", default="1,16,64,256", help="numbers of clients, by commas")
    parser.add_argument("--input-len", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--output-len", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of runs of which the median counts")
    parser.add_argument("--duration", type=float, default=600, help="seconds of the soak")
    parser.add_argument("--idle", type=int, default=1000, help="connections that say nothing in the soak")
    parser.add_argument("--dtype", default="bf16", help="format of the weights, for both")
    parser.add_argument("--engine", default=str(run.ROOT / "target/release/engine"), help="our command")
    parser.add_argument("--output", default=str(run.HERE / "record"), metavar="DIR")
    parser.add_argument("--machine", metavar="NAME", help="name of this machine [default: by processor]")
    parser.add_argument("--tiny", action="store_true", help="toy sizes and one run")
    args = parser.parse_args()
    if args.tiny:
        args.clients, args.input_len, args.output_len = "1,4", 8, 4
        args.repeats, args.duration, args.idle = 1, 2, 16
    args.clients = [int(count) for count in args.clients.split(",")]
    return args


def raise_file_limit():
    """A connection is a file on both sides; what is started here inherits the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# --- what runs ---


class Server:
    """`engine serve` on a free port, from its first health to its end."""

    def __init__(self, args, work):
        self.command = [args.engine, "serve", args.model, "--port", "0", "--dtype", args.dtype, *KV, "--disable-log-stats",
                        # Generation without a server is measured without guesses too.
                        "--speculative-config", "off",
                        # Longer than the soak: connections that say nothing are closed after it.
                        "--header-timeout", str(int(args.duration) + 120)]
        self.log_path = work / "server.log"

    def __enter__(self):
        self.log = self.log_path.open("w")
        self.process = subprocess.Popen(self.command, stdout=self.log, stderr=self.log)
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and self.process.poll() is None:
            found = re.search(r"serving at (http://[^/\s]+)", self.log_path.read_text())
            if found:
                self.url = found[1]
                return self
            time.sleep(0.05)
        self.__exit__()
        sys.exit(f"the server did not start: {self.log_path.read_text()[-500:].strip()}")

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def bench(args, work, command):
    """Runs `engine bench ...` and returns its results and how it was called."""
    path = work / "results.json"
    command = [args.engine, "bench", *command, "--quiet", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    return json.loads(path.read_text())


def lengths(args):
    return run.flags(random_input_len=args.input_len, random_output_len=args.output_len)


def generate_offline(args, work, clients):
    """Output tokens a second of as many prompts at once, without a server."""
    command = ["throughput", args.model, "--num-prompts", str(clients), *lengths(args), "--dtype", args.dtype, *KV,
               *run.flags(repeats=1, num_warmups=0 if args.tiny else 1)]
    return bench(args, work, command)["output_tokens_per_second"]


def compare(args, work, server, clients):
    """As many prompts at once without and with the server, --repeats times, each with prompts of its own."""
    offline, results = [], []
    for seed in range(args.repeats):
        offline.append(generate_offline(args, work, clients))
        command = ["serve", args.model, "--base-url", server.url, "--num-prompts", str(clients),
                   "--max-concurrency", str(clients), "--temperature", "1", *lengths(args), "--seed", str(1000 + seed)]
        results.append(bench(args, work, command))
    rates = [result["output_throughput"] for result in results]
    shares = [rate / alone for rate, alone in zip(rates, offline)]
    middle = lambda key: statistics.median(result[key] for result in results)
    return {"job": "compare", "clients": clients, "runs": len(rates), "offline_tok_s": statistics.median(offline),
            "serve_tok_s": statistics.median(rates), "serve_low_tok_s": min(rates), "serve_high_tok_s": max(rates),
            "ratio": statistics.median(shares), "ratio_low": min(shares), "ratio_high": max(shares),
            "requests": sum(result["completed"] + result["failed"] for result in results),
            "failed": sum(result["failed"] for result in results),
            "ttft_p50_ms": middle("p50_ttft_ms"), "ttft_p99_ms": middle("p99_ttft_ms"),
            "itl_p50_ms": middle("p50_itl_ms"), "itl_p99_ms": middle("p99_itl_ms"),
            "seconds": sum(result["duration"] for result in results),
            "command": "engine " + " ".join(["bench", *command])}


def soak(args, work, server):
    """The most clients for a long time beside idle connections, and the server's memory: (seconds, bytes)."""
    clients = max(args.clients)
    command = ["serve", args.model, "--base-url", server.url, "--server-pid", str(server.process.pid),
               "--max-concurrency", str(clients), "--idle-connections", str(args.idle), "--temperature", "1",
               "--duration", str(args.duration), *lengths(args)]
    result = bench(args, work, command)
    looks, idle = result["server_memory"]["samples"], result["idle_connections"]
    memory = result["server_memory"]
    row = {"job": "soak", "clients": clients, "runs": 1, "serve_tok_s": result["output_throughput"],
           "requests": result["completed"] + result["failed"], "failed": result["failed"],
           "ttft_p50_ms": result["p50_ttft_ms"], "ttft_p99_ms": result["p99_ttft_ms"],
           "itl_p50_ms": result["p50_itl_ms"], "itl_p99_ms": result["p99_itl_ms"], "seconds": result["duration"],
           "idle_opened": idle["opened"], "idle_held": idle["held"], "rss_first_mib": memory["first_bytes"] / MIB,
           "rss_peak_mib": memory["peak_bytes"] / MIB, "rss_last_mib": memory["last_bytes"] / MIB,
           "rss_growth_mib": growth(looks) / MIB, "command": "engine " + " ".join(["bench", *command])}
    return row, looks


def growth(looks):
    """Bytes from the mean of the second fifth of the time, when buffers have their size, to that of the last."""
    end = looks[-1][0]
    fifth = lambda which: [rss for seconds, rss in looks if which <= 5 * seconds / max(end, 1e-9) <= which + 1]
    early, late = fifth(1), fifth(4)
    if not early or not late:
        return looks[-1][1] - looks[0][1]
    return statistics.mean(late) - statistics.mean(early)


# --- what is written ---


def show(row):
    rate = f"{row['serve_tok_s']:.1f} output tok/s"
    share = f", {100 * row['ratio']:.1f} % of offline" if "ratio" in row else f", memory {row['rss_growth_mib']:+.1f} MiB"
    print(f"{row['model']} {row['job']} {row['clients']} clients: {rate}{share}, {row['failed']} failed", file=sys.stderr)


def write_csv(path, columns, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows({key: f"{value:.3f}" if isinstance(value, float) else value for key, value in row.items()}
                         for row in rows)


def table(rows):
    first = rows[0]
    out = [f"{first['machine']}, commit {first['commit']}, {first['date']} UTC, {first['model']}, prompts of "
           f"{first['input_tokens']} and answers of {first['output_tokens']} tokens", "",
           "| clients | offline tok/s | served tok/s | share (low to high) | failed | TTFT p50 / p99 ms | ITL p50 / p99 ms |",
           "|--:|--:|--:|--:|--:|--:|--:|"]
    for row in (row for row in rows if row["job"] == "compare"):
        mark = "" if row["ratio"] >= GOAL else f" (below {100 * GOAL:.0f} %)"
        out.append(f"| {row['clients']} | {row['offline_tok_s']:.1f} | {row['serve_tok_s']:.1f} | "
                   f"{100 * row['ratio']:.1f} %{mark} ({100 * row['ratio_low']:.1f} to {100 * row['ratio_high']:.1f}) | "
                   f"{row['failed']} | {row['ttft_p50_ms']:.1f} / {row['ttft_p99_ms']:.1f} | "
                   f"{row['itl_p50_ms']:.1f} / {row['itl_p99_ms']:.1f} |")
    for row in (row for row in rows if row["job"] == "soak"):
        flat = abs(row["rss_growth_mib"]) <= FLAT * row["rss_peak_mib"]
        out += ["", f"Soak: {row['clients']} clients and {row['idle_held']} of {row['idle_opened']} idle connections for "
                f"{row['seconds']:.0f} s: {row['requests']} requests, {row['failed']} failed, {row['serve_tok_s']:.1f} output "
                f"tok/s. The server's memory: {row['rss_first_mib']:.1f} MiB at first, {row['rss_peak_mib']:.1f} at most, "
                f"{row['rss_last_mib']:.1f} at last; {row['rss_growth_mib']:+.1f} MiB from the second fifth of the time to "
                f"the last: {'flat' if flat else 'not flat'}."]
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    sys.exit(main())
