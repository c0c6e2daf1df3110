#!/usr/bin/env python3
"""What each option of a request costs: processor time of the whole server for a token, with and
without it, in turns.

  build/release/bin/mmfree-pack --random=370m deploy/models/tales R370
  build/venv/bin/python tests/bench/options.py --server=build/release/bin/mmfree-server \\
      --protos=proto --model=R370 --server_flag=--threads=1 [--streams=1] [--tokens=200] [--rounds=3]

`ms` is of the best round, `more` what it is above that of a plain request in the same rounds: with
one thread (others spin while they wait) it means something on a busy machine, too. All streams of a
measurement have the option. Random weights are the worst case for the filters: their logits are flat.
"""

import concurrent.futures
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "integration"))
import live_server

SCHEMA = """{"type": "object", "required": ["name", "list"], "properties": {
    "name": {"type": "string", "minLength": 400}, "list": {"type": "array"}}}"""
GRAMMAR = 'root ::= "(" (word | root)* ")"\nword ::= [a-z]{1,9} " "'


def add_arguments(parser):
    parser.add_argument("--streams", type=int, default=1, help="requests at once")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of an output")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each")


def set_fields(message, fields):
    for name, value in fields.items():
        if isinstance(value, list):
            getattr(message, name).extend(value)
        elif isinstance(value, dict):
            getattr(message, name).update(value)
        else:
            setattr(message, name, value)


def options():
    """By name: fields of sampling, stopping, response and constraint."""
    filters = {"top_k": 40, "top_p": 0.9, "typical_p": 0.95, "min_p": 0.05}
    penalties = {"repetition_penalty": 1.1, "frequency_penalty": 0.5, "presence_penalty": 0.5}
    stops = [f"<stop {i}>" for i in range(64)]
    return {
        "nothing": {},
        "greedy": {"sampling": {"temperature": 0}},
        "banned ids": {"sampling": {"banned_token_ids": list(range(10, 110))}},
        "allowed ids": {"sampling": {"allowed_token_ids": list(range(300, 400))}},
        "logit_bias": {"sampling": {"logit_bias": {i: 1.0 for i in range(300, 400)}}},
        "penalties": {"sampling": penalties},
        **{f"{name} {value}": {"sampling": {name: value}} for name, value in filters.items()},
        "all of these filters": {"sampling": filters},
        "logprobs": {"response": {"logprobs": True}},
        "5 top_logprobs": {"response": {"logprobs": True, "top_logprobs": 5}},
        "64 stop strings": {"stopping": {"stop_strings": stops}},
        "regex": {"constraint": {"regex": "([a-z]+ ){500}"}},
        "GBNF": {"constraint": {"grammar": GRAMMAR}},
        "JSON Schema": {"constraint": {"json_schema": SCHEMA}},
    }


def measure(server, pb, stub, fields, seed):
    """Processor seconds for a token."""
    flags = server.flags

    def run(stream):
        made = pb.GenerateRequest(text="Once upon a time")
        made.sampling.seed = seed * flags.streams + stream
        made.stopping.max_new_tokens = made.stopping.min_new_tokens = flags.tokens
        for part, values in fields.items():
            set_fields(getattr(made, part), values)
        made.stopping.ignore_eos = not made.HasField("constraint")
        tokens = 0
        for event in stub.Generate(made, timeout=600):
            tokens = event.finished.usage.completion_tokens
        return tokens

    before = server.metric("process_cpu_seconds_total")
    with concurrent.futures.ThreadPoolExecutor(flags.streams) as pool:
        tokens = sum(pool.map(run, range(flags.streams)))
    return (server.metric("process_cpu_seconds_total") - before) / tokens


def main():
    with live_server.start(__doc__, add_arguments) as server:
        from mmfree.v1 import inference_pb2 as pb, inference_pb2_grpc
        stub = inference_pb2_grpc.InferenceServiceStub(server.channel)
        best = {}
        for round_number in range(server.flags.rounds + 1):
            for name, fields in options().items():
                seconds = measure(server, pb, stub, fields, round_number)
                # The first time masks are made and pages are touched.
                if round_number > 0:
                    best[name] = min(best.get(name, seconds), seconds)
        print(f"{'option':<22}{'ms':>8}{'more':>8}")
        for name, seconds in best.items():
            print(f"{name:<22}{1e3 * seconds:>8.3f}{seconds / best['nothing'] - 1:>8.1%}")


if __name__ == "__main__":
    main()
