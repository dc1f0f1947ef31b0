"""Marks of generation by vLLM on CPUs: vllm_bench.py '{"model": .., "repeats": .., "marks": [..]}'.

Prints a JSON line a mark: its name, vLLM's version, the seconds of each run. Prompts are new in every run.
"""

import json
import os
import random
import sys
import time

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["HF_HUB_OFFLINE"] = "1"


def main():
    request = json.loads(sys.argv[1])
    model = __import__("to_hf").directory(request["model"])
    import vllm
    from vllm import LLM, SamplingParams

    jobs = [mark["job"] for mark in request["marks"]]
    longest = max(job["input"] + job["output"] for job in jobs)
    most = max(job["prompts"] * job["samples"] for job in jobs)
    begun = time.monotonic()
    engine = LLM(model, dtype="bfloat16", max_model_len=longest, max_num_seqs=most, seed=0)
    # Ids that ordinary text has.
    words = random.Random(0)

    def run(job):
        prompts = [{"prompt_token_ids": [words.randrange(1000, 30000) for _ in range(job["input"])]}
                   for _ in range(job["prompts"])]
        params = SamplingParams(n=job["samples"], temperature=1.0, max_tokens=job["output"], ignore_eos=True,
                                logprobs=job.get("logprobs"))
        clock = time.monotonic()
        made = engine.generate(prompts, params, use_tqdm=False)
        seconds = time.monotonic() - clock
        tokens = sum(len(sample.token_ids) for request in made for sample in request.outputs)
        assert tokens == job["prompts"] * job["samples"] * job["output"], tokens
        return seconds

    run({"prompts": 1, "samples": 1, "input": 4, "output": 1})
    started = time.monotonic() - begun
    for mark in request["marks"]:
        if mark["job"]["kind"] == "start":
            seconds = [started]
        else:
            run(mark["job"])
            seconds = [run(mark["job"]) for _ in range(request["repeats"])]
        print(json.dumps({"mark": mark["name"], "version": vllm.__version__, "seconds": seconds,
                          "command": "vllm LLM.generate, bfloat16"}), flush=True)


if __name__ == "__main__":
    main()
