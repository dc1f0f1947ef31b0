#!/usr/bin/env python3
"""Runs this engine and the peers one after the other and records what they did.

    benches/run.py MODEL.gguf [MODEL.gguf ...] [--marks NAME,NAME] [--peers DIR] [--repeats N] [--peer-minutes M]
    benches/run.py --tiny            every mark of ours at a toy size: a test that the plumbing works

Writes benches/record/MACHINE/DATE.csv, and beside it DATE.md (a table) and DATE.svg (a plot of the shares
of the machine's limit). A peer that is not installed below DIR (see benches/peers/install.sh), fails, or
is not done with a mark when its minutes are over, is a row that says so. Needs Python 3.11 and nothing else; peers bring their own Python. Quote only what
was recorded with nothing else running.
"""

import argparse
import csv
import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import tomllib

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
PEERS = {"vllm": ["generate", "start"], "llama.cpp": ["generate", "stored"], "trl": ["rl"]}
COLUMNS = ["date", "machine", "commit", "model", "mark", "tool", "version", "status", "value", "unit", "limit",
           "share", "runs", "low_s", "high_s", "command"]
TINY = {"prompts": 2, "samples": 2, "input": 8, "output": 4}


def main():
    args = arguments()
    marks = chosen(args)
    models = args.models or ["builtin:arith"]
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H%M")
    base = {"date": stamp, "machine": args.machine or machine(), "commit": commit()}
    rows = []
    for model in models:
        for mark in marks:
            rows.append({**base, **ours(args, model, mark)})
            show(rows[-1])
        if args.tiny and not args.peers:
            continue
        for peer, kinds in PEERS.items():
            wanted = [mark for mark in marks if mark["job"]["kind"] in kinds]
            wanted += [mark for mark in marks if wanted and peer in mark.get("also", [])]
            for row in theirs(args, peer, model, wanted):
                rows.append({**base, **row})
                show(rows[-1])
    limits(rows)
    folder = pathlib.Path(args.output) / base["machine"]
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / f"{stamp}.csv", rows)
    (folder / f"{stamp}.md").write_text(table(rows, marks))
    (folder / f"{stamp}.svg").write_text(plot(rows, marks))
    print(folder / f"{stamp}.csv")
    return 1 if any(row["status"] == "failed" for row in rows) else 0


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="a .gguf file [default: builtin:arith]")
    parser.add_argument("--marks", help="names from marks.toml, by commas [default: all]")
    parser.add_argument("--peers", metavar="DIR", help="where benches/peers/install.sh has put them")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median counts")
    parser.add_argument("--peer-repeats", type=int, help="the same for peers [default: as ours]")
    parser.add_argument("--peer-minutes", type=float, help="most minutes for each peer and model [default: no end]")
    parser.add_argument("--engine", default=str(ROOT / "target/release/engine"), help="our command")
    parser.add_argument("--output", default=str(HERE / "record"), metavar="DIR")
    parser.add_argument("--machine", metavar="NAME", help="name of this machine [default: by processor]")
    parser.add_argument("--tiny", action="store_true", help="toy sizes and one run")
    args = parser.parse_args()
    if args.tiny:
        args.repeats = 1
    return args


def chosen(args):
    marks = tomllib.loads((HERE / "marks.toml").read_text())["mark"]
    if args.marks:
        names = args.marks.split(",")
        unknown = set(names) - {mark["name"] for mark in marks}
        if unknown:
            sys.exit(f"unknown marks: {', '.join(sorted(unknown))}")
        marks = [mark for mark in marks if mark["name"] in names]
    if args.tiny:
        for mark in marks:
            mark["what"] = f"{mark['name']} at a toy size"
            mark["job"].update({key: min(mark["job"][key], most) for key, most in TINY.items()})
    return marks


# --- what runs ---


def ours(args, model, mark):
    """One mark by this engine."""
    if mark["bench"] == "start":
        return start(args, model, mark)
    job = mark["job"]
    command = [args.engine, "bench", mark["bench"], model]
    if mark["bench"] == "rl":
        command += flags(prompts=job["prompts"], group=job["samples"], prompt_len=job["input"],
                         response_len=job["output"])
    else:
        command += flags(num_prompts=job["prompts"], n=job["samples"], random_input_len=job["input"],
                         random_output_len=job["output"])
        if "logprobs" in job:
            command += flags(logprobs=job["logprobs"])
    command += flags(dtype="auto" if mark.get("weights") == "stored" else "bf16")
    command += flags(repeats=args.repeats, num_warmups=0 if args.tiny else 1)
    row = {"model": name_of(model), "mark": mark["name"], "tool": "engine", "unit": mark["unit"],
           "command": " ".join(["engine"] + command[1:])}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "results.json"
        done = subprocess.run(command + ["--quiet", "--json", str(path)], capture_output=True, text=True)
        if done.returncode != 0:
            print(done.stderr.strip(), file=sys.stderr)
            return {**row, "status": "failed"}
        results = json.loads(path.read_text())
    value = results[mark["value"]]
    share = results["share_of_limit"]
    limit = value * share if mark["unit"] == "s" else value / share
    elapsed = results["elapsed"]
    return {**row, "version": results["machine"]["version"], "status": "ok", "value": value, "limit": limit,
            "share": share, "runs": elapsed["count"], "low_s": elapsed["min"], "high_s": elapsed["max"]}


def start(args, model, mark):
    """Seconds of whole processes that generate one token, after one that fills the file cache."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        prompts = pathlib.Path(folder) / "prompts.jsonl"
        prompts.write_text(json.dumps({"prompt_token_ids": [1, 2, 3, 4]}) + "\n")
        command = [args.engine, "generate", model, "--prompts", str(prompts), "--max-tokens", "1", "--ignore-eos", "--dtype", "bf16"]
        row = {"model": name_of(model), "mark": mark["name"], "tool": "engine", "unit": mark["unit"],
               "command": "engine generate MODEL --prompts ONE.jsonl --max-tokens 1 --ignore-eos --dtype bf16"}
        for _ in range(args.repeats + 1):
            begun = time.monotonic()
            done = subprocess.run(command + ["--quiet"], capture_output=True, text=True)
            seconds.append(time.monotonic() - begun)
            if done.returncode != 0:
                print(done.stderr.strip(), file=sys.stderr)
                return {**row, "status": "failed"}
    return measured(row, mark, {"seconds": seconds[1:], "version": "", "command": row["command"]})


def theirs(args, peer, model, marks):
    """All marks that a peer can run, in one process of it."""
    folder = pathlib.Path(args.peers or "/nonexistent") / peer
    script = HERE / "peers" / f"{peer.replace('.', '_')}_bench.py"
    python = folder / "bin/python"
    blank = [{"model": name_of(model), "mark": mark["name"], "tool": peer, "unit": mark["unit"]} for mark in marks]
    if not marks:
        return []
    if not python.exists():
        print(f"{peer}: missing, {folder} has no bin/python", file=sys.stderr)
        return [{**row, "status": "missing"} for row in blank]
    request = json.dumps({"model": os.path.abspath(model), "repeats": args.peer_repeats or args.repeats, "marks": marks})
    command = [str(python), str(script), request]
    print(f"{peer}: running", file=sys.stderr)
    output, ended = bounded(command, args.peer_minutes)
    found = {}
    for line in output.splitlines():
        if line.startswith('{"mark"'):
            result = json.loads(line)
            found[result["mark"]] = result
    rows = [measured(row, mark, found.get(mark["name"])) for row, mark in zip(blank, marks)]
    for row in rows:
        if row["status"] == "failed" and not ended:
            row["status"] = "out of time"
    return rows


def bounded(command, minutes):
    """What a command printed, and whether it ended by itself rather than when its minutes were over."""
    with tempfile.TemporaryDirectory() as work:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=work, start_new_session=True)
        try:
            return process.communicate(timeout=minutes and 60 * minutes)[0], True
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.communicate()[0], False


def measured(row, mark, result):
    """A peer's row from the seconds of its runs."""
    if result is None or not result.get("seconds"):
        return {**row, "status": "failed"}
    seconds = sorted(result["seconds"])
    median = seconds[len(seconds) // 2]
    job = mark["job"]
    made = job["prompts"] * job["samples"] * job["output"]
    tokens = made + job["prompts"] * job["input"] if mark["value"] == "tokens_per_second" else made
    return {**row, "version": result["version"], "status": "ok", "runs": len(seconds), "low_s": seconds[0],
            "high_s": seconds[-1], "value": median if mark["unit"] == "s" else tokens / median,
            "command": result.get("command", "")}


def limits(rows):
    """Peers are compared with the limit that was measured with ours."""
    known = {(r["model"], r["mark"]): r["limit"] for r in rows if r.get("limit")}
    for row in rows:
        limit = known.get((row["model"], row["mark"]))
        if limit and row["status"] == "ok" and not row.get("share"):
            row["limit"] = limit
            row["share"] = limit / row["value"] if row["unit"] == "s" else row["value"] / limit


# --- where it runs ---


def machine():
    """Processor family, cores and the widest features, e.g. zen3-2c-avx2."""
    info = {}
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        info.setdefault(key.strip(), value.strip())
    family, model = int(info.get("cpu family", 0)), int(info.get("model", 0))
    features = info.get("flags", "").split()
    if info.get("vendor_id") == "AuthenticAMD":
        zen = {23: "zen2" if model >= 48 else "zen", 25: "zen4" if model in range(16, 32) or model >= 96 else "zen3"}
        kind = zen.get(family, "zen5" if family == 26 else f"amd{family}")
    else:
        intel = {85: "skylake-x", 106: "icelake-x", 108: "icelake-d", 143: "sapphire-rapids", 207: "emerald-rapids",
                 173: "granite-rapids"}
        kind = intel.get(model, f"x86-{family}-{model}")
    level = "amx" if "amx_bf16" in features else "avx512" if "avx512f" in features else "avx2"
    return f"{kind}-{len(os.sched_getaffinity(0))}c-{level}"


def commit():
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() or "unknown"


def name_of(model):
    return pathlib.Path(model).name.removesuffix(".gguf")


def flags(**values):
    return [part for key, value in values.items() for part in (f"--{key.replace('_', '-')}", str(value))]


# --- what is written ---


def show(row):
    value = f"{row['value']:.2f} {row['unit']}" if row["status"] == "ok" else row["status"]
    share = f", {100 * row['share']:.0f} % of the limit" if row.get("share") else ""
    print(f"{row['model']} {row['mark']} {row['tool']}: {value}{share}", file=sys.stderr)


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)


def tools_of(rows):
    return ["engine"] + [peer for peer in PEERS if any(row["tool"] == peer for row in rows)]


def find(rows, model, mark, tool):
    of = (row for row in rows if (row["model"], row["mark"], row["tool"]) == (model, mark, tool))
    return next(of, None)


def table(rows, marks):
    """Marks down, tools across, with the share of the limit and how often ours is a peer's."""
    tools = tools_of(rows)
    out = [f"{rows[0]['machine']}, commit {rows[0]['commit']}, {rows[0]['date']} UTC", ""]
    for model in dict.fromkeys(row["model"] for row in rows):
        out += [f"| {model} | limit | " + " | ".join(tools) + " |", "|---|--:|" + "--:|" * len(tools)]
        for mark in marks:
            own = find(rows, model, mark["name"], "engine")
            cells = [cell(find(rows, model, mark["name"], tool), own) for tool in tools]
            limit = f"{own['limit']:.4g} {mark['unit']}" if own and own.get("limit") else ""
            out.append(f"| {mark['what']} | {limit} | " + " | ".join(cells) + " |")
        out.append("")
    return "\n".join(out)


def cell(row, own):
    if row is None:
        return ""
    if row["status"] != "ok":
        return row["status"]
    text = f"{row['value']:.4g}"
    if row["tool"] == "engine":
        return f"{text} ({100 * row['share']:.0f} %)" if row.get("share") else text
    if own and own["status"] == "ok":
        ratio = row["value"] / own["value"] if row["unit"] == "s" else own["value"] / row["value"]
        text += f" (ours {ratio:.1f} x)"
    return text


def plot(rows, marks):
    """Bars: what each tool reaches of the limit of the machine."""
    colours = {"engine": "#1f6feb", "vllm": "#d97706", "llama.cpp": "#059669", "trl": "#7c3aed"}
    done = [row for row in rows if row["status"] == "ok" and row.get("share")]
    names = {mark["name"]: mark["what"] for mark in marks}
    lines, y = [], 44
    for model, mark in dict.fromkeys((row["model"], row["mark"]) for row in done):
        lines.append(f'<text x="10" y="{y + 10}" font-weight="bold">{escape(model)}: {escape(names[mark])}</text>')
        y += 18
        for row in (row for row in done if (row["model"], row["mark"]) == (model, mark)):
            width = 4.2 * min(100 * row["share"], 100)
            text = f"{100 * row['share']:.0f} %  {row['value']:.4g} {row['unit']}"
            lines.append(f'<text x="100" y="{y + 10}" text-anchor="end">{row["tool"]}</text>'
                         f'<rect x="110" y="{y}" width="{width:.1f}" height="12" fill="{colours[row["tool"]]}"/>'
                         f'<text x="{116 + width:.1f}" y="{y + 10}">{escape(text)}</text>')
            y += 16
        y += 8
    title = f"Share of the limit of the machine, {rows[0]['machine']}, {rows[0]['date'][:10]}"
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="680" height="{y + 10}" font-family="sans-serif" '
            f'font-size="11"><rect width="100%" height="100%" fill="white"/>'
            f'<text x="10" y="22" font-size="14">{escape(title)}</text>\n' + "\n".join(lines) + "\n</svg>\n")


def escape(text):
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


if __name__ == "__main__":
    sys.exit(main())
