#!/usr/bin/env python3
"""What speculative decoding gains: tokens a second and tokens a step with and without it, in turns.

  build/venv/bin/python tests/bench/speculation.py --server=build/release/bin/mmfree-server \\
      --protos=proto --model=deploy/models/tales [--tokens=400] [--rounds=3] [--server_flag=--threads=1]

Each line is of one kind of text and one number of proposed tokens (0: off). The kinds:
  story      what the model says, greedily
  lists      the same after a prompt that repeats itself
  everything all proposals are right: one token is allowed
  nothing    none is: tokens are drawn at a high temperature
With random weights only the last two mean anything. `time` and `cpu` are how many times less time,
and processor time of the server, a token takes than without, of the best round each; the latter means
something on a busy machine, too, with one thread (others spin while they wait).
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "integration"))
import live_server

STORY = "Once upon a time there was an old woman who lived with her son in a small house."
LISTS = "The wolf has grey fur. The fox has red fur. " * 6 + "The wolf has"
METRICS = {"steps": "mmfree_step_duration_seconds_count",
           "proposed": "mmfree_speculative_proposed_tokens_total",
           "accepted": "mmfree_speculative_accepted_tokens_total",
           "cpu": "process_cpu_seconds_total"}


def add_arguments(parser):
    parser.add_argument("--tokens", type=int, default=400, help="tokens of an output")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each")


def request(pb, kind, tokens, proposals):
    made = pb.GenerateRequest(text=LISTS if kind == "lists" else STORY)
    made.speculative_tokens = proposals
    made.sampling.temperature = 100 if kind == "nothing" else 0
    made.sampling.seed = 1
    if kind == "everything":
        made.sampling.allowed_token_ids.append(300)
    made.stopping.max_new_tokens = tokens
    made.stopping.ignore_eos = True
    return made


def measure(stub, server, made):
    before = {name: server.metric(metric) for name, metric in METRICS.items()}
    text = ""
    for event in stub.Generate(made, timeout=600):
        text += event.delta.text
        if event.HasField("finished"):
            decode = event.finished.timings.decode
            seconds = decode.seconds + decode.nanos * 1e-9
    counts = {name: server.metric(metric) - before[name] for name, metric in METRICS.items()}
    return seconds, counts, text


def main():
    with live_server.start(__doc__, add_arguments) as server:
        from mmfree.v1 import inference_pb2 as pb, inference_pb2_grpc
        stub = inference_pb2_grpc.InferenceServiceStub(server.channel)
        tokens = server.flags.tokens
        print(f"{'text':<11}{'proposed':>9}{'tokens/s':>10}{'time':>7}{'cpu':>7}"
              f"{'tokens/step':>12}{'accepted':>10}")
        for kind in ["story", "lists", "everything", "nothing"]:
            best, cpu = {}, {}
            for _ in range(server.flags.rounds):
                for proposals in [0, 2, 4, 8, 16]:
                    result = measure(stub, server, request(pb, kind, tokens, proposals))
                    best[proposals] = min(best.get(proposals, result), result, key=lambda r: r[0])
                    cpu[proposals] = min(cpu.get(proposals, result[1]["cpu"]), result[1]["cpu"])
            for proposals, (seconds, counts, text) in best.items():
                assert text == best[0][2], "speculation changed the output"
                share = counts["accepted"] / counts["proposed"] if counts["proposed"] else 0
                print(f"{kind:<11}{proposals:>9}{(tokens - 1) / seconds:>10.1f}"
                      f"{best[0][0] / seconds:>7.2f}{cpu[0] / cpu[proposals]:>7.2f}"
                      f"{tokens / counts['steps']:>12.2f}{share:>10.0%}", flush=True)


if __name__ == "__main__":
    main()
