"""The step of learning by TRL on CPUs: trl_bench.py '{"model": .., "repeats": .., "marks": [..]}'.

GRPO in bf16 without a reference policy, one update a step, every response of full length; prompts are words
of which the tokenizer makes about as many tokens as asked for. A mark of another kind is a job of as many responses:
it gets what the step's generation takes.
"""

import json
import os
import random
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"
WORDS = "the river ran past seven old houses while a boy counted green boats and small red apples on his way".split()


def main():
    request = json.loads(sys.argv[1])
    model = __import__("to_hf").directory(request["model"])
    learning = [mark for mark in request["marks"] if mark["job"]["kind"] == "rl"]
    generating = [mark for mark in request["marks"] if mark["job"]["kind"] != "rl"]
    for mark in learning:
        version, whole, generation = steps(model, mark["job"], request["repeats"])
        rows = [(mark, whole, "trl GRPOTrainer, bf16, beta 0")]
        made = lambda mark: [mark["job"][key] for key in ("prompts", "samples", "output")]
        rows += [(other, generation, f"generation within the step of {mark['name']}")
                 for other in generating if made(other) == made(mark)]
        for row, seconds, command in rows:
            print(json.dumps({"mark": row["name"], "version": version, "seconds": seconds, "command": command}),
                  flush=True)


def steps(path, job, repeats):
    """TRL's version, the seconds of each step after a first one, and of the generation within each."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    draw = random.Random(0)
    prompt = lambda: " ".join(draw.choice(WORDS) for _ in range(max(1, job["input"] - 5)))
    data = Dataset.from_list([{"prompt": prompt()} for _ in range(32 * job["prompts"])])
    batch = min(16, job["prompts"] * job["samples"])
    config = GRPOConfig(
        output_dir="output", use_cpu=True, bf16=True, per_device_train_batch_size=batch,
        gradient_accumulation_steps=job["prompts"] * job["samples"] // batch, num_generations=job["samples"],
        max_completion_length=job["output"], generation_kwargs={"min_new_tokens": job["output"]},
        max_steps=repeats + 1, learning_rate=1e-6, beta=0.0, temperature=1.0, report_to=[], save_strategy="no",
        gradient_checkpointing=False)
    seconds, generation = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.begun = time.monotonic()
            generation.append(0.0)

        def on_step_end(self, *args, **kwargs):
            seconds.append(time.monotonic() - self.begun)

    reward = lambda completions, **kwargs: [float(len(set(text))) for text in completions]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    generate = model.generate

    def timed(*args, **kwargs):
        begun = time.monotonic()
        try:
            return generate(*args, **kwargs)
        finally:
            if generation:
                generation[-1] += time.monotonic() - begun

    model.generate = timed
    trainer = GRPOTrainer(model=model, reward_funcs=reward, args=config, train_dataset=data,
                          processing_class=AutoTokenizer.from_pretrained(path), callbacks=[Clock()])
    trainer.train()
    return trl.__version__, seconds[1:], generation[1:]


if __name__ == "__main__":
    main()
