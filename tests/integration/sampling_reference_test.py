#!/usr/bin/env python3
"""Tokens and logprobs of random sampling options against a reference of its own.

The reference is written from server/sampling/README.md in float64, over the logits that Score gives
for what was emitted; the requests go to a real server. Exits with 77 (skipped) where grpcio-tools or
numpy is not installed.
"""

import collections
import concurrent.futures
import math
import random
import sys

try:
    import numpy as np
except ImportError as error:
    print(f"SKIPPED: needs numpy: {error}")
    sys.exit(77)

import live_server

REQUESTS = 80
EOS = 2
PROMPTS = ["", "Once upon a time", "The cat sat on the mat. The cat sat on", "é😀 naïve"]
# Weights are of exp in float32 on the server: what hangs on less than this of them is not judged.
MARGIN = 1e-6


def random_options(r, vocab, request):
    """Each option now and then, at its edges, too."""
    sampling, stopping, response = request.sampling, request.stopping, request.response
    often = lambda p=0.3: r.random() < p
    if often():
        sampling.allowed_token_ids.extend(r.sample(range(vocab), r.choice([1, 2, 50, 2000])))
    if often():
        sampling.banned_token_ids.extend(r.sample(range(vocab), r.choice([1, 100, 3000])))
    if often():
        for i in r.sample(range(vocab), r.choice([1, 200])):
            sampling.logit_bias[i] = r.choice([-100, 100, 0, r.uniform(-5, 5)])
    if often():
        sampling.repetition_penalty = r.choice([0.5, 1.0, 1.2, 10.0])
    if often():
        sampling.repetition_window = r.choice([0, 1, 5, 1024])
    if often():
        sampling.frequency_penalty = r.choice([-2, 2, 0.5])
    if often():
        sampling.presence_penalty = r.choice([-2, 2, 0.5])
    if often(0.8):
        sampling.temperature = r.choice([0, 1, 0.7, 5, 1e-6, 100])
    if often():
        sampling.top_k = r.choice([0, 1, 40, vocab, 10**6])
    if often():
        sampling.typical_p = r.choice([1.0, 0.9, 0.2, 1e-6])
    if often():
        sampling.top_p = r.choice([0.0, 1.0, 0.9, 0.01])
    if often():
        sampling.min_p = r.choice([0.0, 1.0, 0.05])
    sampling.seed = r.choice([0, 2**64 - 1, r.randrange(2**64)])
    stopping.max_new_tokens = r.choice([1, 6])
    stopping.ignore_eos = often()
    if often():
        stopping.min_new_tokens = r.randrange(stopping.max_new_tokens + 1)
    if often():
        stopping.stop_token_ids.extend(r.sample(range(vocab), 60))
    response.return_token_ids = True
    response.logprobs = True
    response.top_logprobs = r.choice([0, 1, 20])
    response.logprob_mode = r.choice([0, 1, 2])
    request.candidates = r.choice([1, 1, 3])
    request.speculative_tokens = r.choice([0, 4])


def uniform_bits(seed, position, candidate):
    """Philox4x32-10."""
    low = 0xFFFFFFFF
    c = [position & low, position >> 32, candidate, 0]
    key = [seed & low, seed >> 32]
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(q >> 32) ^ c[1] ^ key[0], q & low, (p >> 32) ^ c[3] ^ key[1], p & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return c[0] | c[1] << 32


def share(p, total):
    return -(-int(np.float32(p) * 2.0**40) * total >> 40)


class Draw:
    """What the next token is: `token`, from `weights` by id (None: greedy), sure beyond `margin`."""

    def __init__(self, request, logits, context, emitted, candidate):
        self.margin = 1.0
        self.weights = None
        sampling = request.sampling
        l, mask = self._changed(request, logits, context, emitted)
        ids = np.nonzero(mask)[0]
        self.token = int(ids[np.argmax(l[ids])])
        temperature = np.float32(sampling.temperature if sampling.HasField("temperature") else 1)
        if temperature == 0:
            return
        x = np.full(len(l), -np.inf)
        x[ids] = (l[ids] - l[self.token]) * (np.float32(1) / temperature)
        w = np.floor(np.exp(x) * 2.0**40)
        weights = {int(i): int(w[i]) for i in ids if w[i] > 0}
        kept = sorted(self._filtered(sampling, weights, l, x))
        self.weights = {i: weights[i] for i in kept}
        self.total = sum(self.weights.values())
        drawn = uniform_bits(sampling.seed, len(context), candidate) * self.total >> 64
        running = 0
        for i in kept:
            running += weights[i]
            self.margin = min(self.margin, abs(running - drawn) / self.total)
            if running > drawn:
                self.token = i
                return

    @staticmethod
    def _changed(request, logits, context, emitted):
        sampling, stopping = request.sampling, request.stopping
        l = logits.copy()
        mask = np.full(len(l), not sampling.allowed_token_ids)
        mask[list(sampling.allowed_token_ids)] = True
        mask[list(sampling.banned_token_ids)] = False
        if len(emitted) < stopping.min_new_tokens:
            mask[ends_of(stopping)] = False
        for i, bias in sampling.logit_bias.items():
            l[i] += np.float32(bias)
        window = sampling.repetition_window if sampling.HasField("repetition_window") else 64
        if sampling.HasField("repetition_penalty") and window:
            penalty = np.float32(sampling.repetition_penalty)
            for i in set(context[-window:]):
                l[i] = l[i] / penalty if l[i] > 0 else l[i] * penalty
        for i, n in collections.Counter(emitted).items():
            l[i] -= np.float32(sampling.frequency_penalty) * np.float32(n)
            l[i] -= np.float32(sampling.presence_penalty)
        return l, mask

    def _filtered(self, sampling, weights, l, x):
        kept = sorted(weights, key=lambda i: (-l[i], i))
        if sampling.top_k:
            kept = kept[:sampling.top_k]
        if sampling.HasField("typical_p") and sampling.typical_p < 1:
            information = {i: int(-x[i] * 2.0**24) for i in kept}
            mean = sum(weights[i] * information[i] for i in kept) // sum(weights[i] for i in kept)
            kept = self._prefix(sorted(kept, key=lambda i: (abs(information[i] - mean), i)),
                                weights, sampling.typical_p)
            kept.sort(key=lambda i: (-l[i], i))
        if sampling.HasField("top_p") and sampling.top_p < 1:
            kept = self._prefix(kept, weights, sampling.top_p)
        least = share(sampling.min_p, max(weights[i] for i in kept))
        if sampling.min_p > 0:
            near = [abs(weights[i] - least) / least for i in kept if weights[i] != weights[kept[0]]]
            self.margin = min([self.margin] + near)
        return [i for i in kept if weights[i] >= least]

    def _prefix(self, order, weights, p):
        total = sum(weights[i] for i in order)
        running = 0
        for n, i in enumerate(order):
            running += weights[i]
            self.margin = min(self.margin, abs(running - share(p, total)) / total)
            if running >= share(p, total):
                return order[:n + 1]
        return order


def ends_of(stopping):
    return list(stopping.stop_token_ids) + ([] if stopping.ignore_eos else [EOS])


def model_logprobs(logits):
    l = logits.astype(np.float64)
    return l - l.max() - math.log(np.exp(l - l.max()).sum())


def check_logprobs(request, draw, logits, said):
    """A token's logprob and its alternatives."""
    if request.response.logprob_mode != 2:
        of = model_logprobs(logits)
        order = np.lexsort((np.arange(len(logits)), -logits))
    elif draw.weights is None:
        of, order = {draw.token: 0.0}, [draw.token]
    else:
        of = {i: math.log(w / draw.total) for i, w in draw.weights.items()}
        order = sorted(of, key=lambda i: (-of[i], i))
    top = [int(i) for i in order[:request.response.top_logprobs]]
    assert len(said.top) == len(top)
    for alternative, i in [(said, draw.token)] + list(zip(said.top, top)):
        # Weights have 40 binary places: far down they are few.
        if of[i] < -15:
            continue
        assert abs(alternative.logprob - of[i]) < 2e-4, (alternative, of[i])
        assert abs(of[alternative.token_id] - of[i]) < 2e-4, (alternative, i)


def check(client, seed, vocab):
    """False when it hangs on less than the margin."""
    r = random.Random(seed)
    request = client.pb.GenerateRequest(text=r.choice(PROMPTS))
    random_options(r, vocab, request)
    try:
        outputs = client.generate(request)
    except client.error as error:
        # Only what leaves nothing is refused.
        assert "leave a token" in error.details() or "does not end" in error.details(), error
        return True
    prompt = client.tokenize(request.text)
    ends = ends_of(request.stopping)
    for candidate, (ids, logprobs, finished) in outputs.items():
        contexts = [prompt + ids[:n] for n in range(len(ids) + 1)]
        for n, logits in enumerate(client.logits(contexts)):
            if n == request.stopping.max_new_tokens:
                assert finished.finish_reason == client.pb.FINISH_REASON_LENGTH
                break
            draw = Draw(request, logits, contexts[n], ids[:n], candidate)
            if draw.margin < MARGIN:
                return False
            if n == len(ids):
                assert draw.token in ends and finished.stop_token_id == draw.token, (seed, n)
            else:
                assert draw.token == ids[n] and draw.token not in ends, (seed, n, draw.token, ids)
                check_logprobs(request, draw, logits, logprobs[n])
    return True


class Client:
    def __init__(self, channel):
        import grpc
        from mmfree.v1 import inference_pb2 as pb, inference_pb2_grpc
        self.pb = pb
        self.error = grpc.RpcError
        self._stub = inference_pb2_grpc.InferenceServiceStub(channel)

    def generate(self, request):
        """By candidate: ids, logprobs, the last event."""
        outputs = collections.defaultdict(lambda: [[], [], None])
        for event in self._stub.Generate(request, timeout=120):
            outputs[event.delta.candidate][0] += event.delta.token_ids
            outputs[event.delta.candidate][1] += event.delta.logprobs
            if event.HasField("finished"):
                outputs[event.finished.candidate][2] = event.finished
        return outputs

    def tokenize(self, text):
        return list(self._stub.Tokenize(self.pb.TokenizeRequest(text=text)).token_ids)

    def logits(self, contexts):
        request = self.pb.ScoreRequest(last_logits=True)
        for ids in contexts:
            request.inputs.add().token_ids.ids.extend(ids)
        results = self._stub.Score(request, timeout=120).results
        return [np.array(result.last_logits, dtype=np.float32) for result in results]


def main():
    with live_server.connect(__doc__) as channel:
        client = Client(channel)
        vocab = len(client.logits([[1]])[0])
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            sure = list(pool.map(lambda seed: check(client, seed, vocab), range(REQUESTS)))
        assert sum(sure) > 0.9 * REQUESTS, f"only {sum(sure)} of {REQUESTS} could be judged"
    print(f"{sum(sure)} of {REQUESTS} requests gave the reference's tokens and logprobs")


if __name__ == "__main__":
    main()
