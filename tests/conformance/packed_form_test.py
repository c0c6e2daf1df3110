#!/usr/bin/env python3
"""Reads the demo model with the safetensors package, by FORMAT.md alone, and checks every byte of it.

usage: packed_form_test.py MODEL_DIR

Exit status 77: the safetensors or numpy package is not installed, nothing was checked.
"""

import hashlib
import json
import os
import struct
import sys

try:
    import numpy as np
    from safetensors import safe_open
except ImportError as missing:
    print(f"SKIPPED: {missing}")
    sys.exit(77)


def up(n, m):
    return (n + m - 1) // m * m


def expected_tensors(config):
    """(name, dtype, stored shape, rows, columns) in the order of the file; rows 0: not ternary."""
    d, f = config["hidden_size"], config["intermediate_size"]
    v = config["vocab_size"]

    def ternary(name, rows, cols):
        return (name, "U8", [up(rows, 4) // 4, up(cols, 64)], rows, cols)

    def vector(name, size):
        return (name, "F32", [up(size, 16)], 0, size)

    for n in range(config["num_hidden_layers"]):
        p = f"model.layers.{n}."
        for name in "ifgo":
            yield ternary(f"{p}attn.{name}_proj.weight", d, d)
        yield ternary(p + "mlp.gate_proj.weight", 2 * f, d)
        yield ternary(p + "mlp.down_proj.weight", d, f)
        yield vector(p + "attn_norm.weight", d)
        for name in "ifg":
            yield vector(f"{p}attn.{name}_proj.norm.weight", d)
        yield vector(p + "attn.g_norm.weight", d)
        yield vector(p + "attn.o_proj.norm.weight", d)
        yield vector(p + "mlp_norm.weight", d)
        yield vector(p + "mlp.gate_proj.norm.weight", d)
        yield vector(p + "mlp.down_proj.norm.weight", f)
        yield vector(p + "attn.lower_bound", d)
    yield ternary("lm_head.weight", v, d)
    yield vector("model.norm.weight", d)
    yield vector("lm_head.norm.weight", d)
    yield ("model.embeddings.weight", "F16", [v, d], 0, d)


def unpack(codes, rows, cols):
    """Weights in {-1, 0, 1} of a ternary tensor, padding included and then cut off."""
    w = (codes[:, None, :] >> np.array([0, 2, 4, 6], np.uint8)[None, :, None]) & 3
    assert w.max() <= 2, "code 3"
    w = w.reshape(-1, codes.shape[1]).astype(np.int8) - 1
    assert not w[rows:].any() and not w[:, cols:].any(), "padding is not weight 0"
    return w[:rows, :cols]


def float_bits(value):
    return struct.pack(">f", value).hex()


def main(directory):
    with open(os.path.join(directory, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    path = os.path.join(directory, "model.safetensors")
    with open(path, "rb") as file:
        raw = file.read()
    (header_length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + header_length])
    data_start = 8 + header_length
    assert data_start % 64 == 0, "the data do not begin at a multiple of 64"

    digest = [
        "mmfree model 1",
        f"vocab_size {config['vocab_size']}",
        f"hidden_size {config['hidden_size']}",
        f"intermediate_size {config['intermediate_size']}",
        f"num_hidden_layers {config['num_hidden_layers']}",
        f"rms_norm_eps {float_bits(config['rms_norm_eps'])}",
        f"use_lower_bound {int(config['use_lower_bound'])}",
        f"bos_token_id {config['bos_token_id']}",
        f"eos_token_id {config['eos_token_id']}",
    ]
    tensors = list(expected_tensors(config))
    end = 0
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
        assert metadata["format"] == "mmfree-packed", metadata["format"]
        assert metadata["format_version"] == "1", metadata["format_version"]
        names = {name for name, *_ in tensors}
        assert set(file.keys()) == names, set(file.keys()) ^ names
        for name, dtype, shape, rows, cols in tensors:
            begin, stop = header[name]["data_offsets"]
            assert begin == end and begin % 64 == 0, f"{name} at {begin}, expected {end}"
            end = stop
            assert header[name]["dtype"] == dtype, f"{name}: {header[name]['dtype']}"
            tensor = file.get_tensor(name)
            assert list(tensor.shape) == shape, f"{name}: {tensor.shape}, expected {shape}"
            sha256 = hashlib.sha256(raw[data_start + begin : data_start + stop]).hexdigest()
            assert sha256 == metadata["sha256:" + name], f"{name}: SHA-256"
            assert sha256 == hashlib.sha256(tensor.tobytes()).hexdigest(), f"{name}: package"
            line = f"{name} {dtype} {sha256}"
            if rows:
                scale = np.float32(metadata["scale:" + name])
                assert np.isfinite(scale) and scale > 0, f"{name}: scale {scale}"
                line += " " + float_bits(scale)
                weights = unpack(tensor, rows, cols)
                # A trained matrix uses all three values.
                shares = [float((weights == w).mean()) for w in (-1, 0, 1)]
                assert all(0.1 < share < 0.8 for share in shares), f"{name}: {shares}"
            elif dtype == "F32":
                assert np.isfinite(tensor).all(), f"{name}: not finite"
                assert not tensor[cols:].any(), f"{name}: padding"
            digest.append(line)
    assert data_start + end == len(raw), "bytes after the last tensor"
    text = "".join(line + "\n" for line in digest)
    computed = hashlib.sha256(text.encode()).hexdigest()
    assert computed == metadata["digest"], f"digest: computed {computed}"
    assert not any("scale:" + name in metadata for name, _, _, rows, _ in tensors if not rows)
    print(f"{len(tensors)} tensors, {len(raw)} bytes, digest {computed}: as documented")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
