#!/usr/bin/env python3
"""Constrained outputs conform: random schemas, expressions and seeds against a real server.

The judges are the jsonschema package and re, which know nothing of ours. Exits with 77 (skipped)
where grpcio-tools or jsonschema is not installed.
"""

import concurrent.futures
import json
import random
import re
import sys

try:
    import jsonschema
except ImportError as error:
    print(f"SKIPPED: needs jsonschema: {error}")
    sys.exit(77)

import live_server

SCHEMAS = 300
EXPRESSIONS = 200
MAX_NEW_TOKENS = 250
WORDS = ["name", "age", "colour", "a b", "naïve", "id", "x/y", "~z", 'quo"te', "list"]


def random_value(r):
    return r.choice([None, True, 0, -17, 3.5, 1.0, 2**53 + 1, -3 * 10**25, 1.5e300, "", "two words",
                     'a "quoted" \\ naïve \n text', [1, "x"], {"k": [False]}])


def random_schema(r, depth=0):
    kinds = ["string", "pattern", "integer", "number", "decimal", "boolean", "null", "enum", "const",
             "multiple", "set", "types", "large"]
    if depth < 3:
        kinds += ["object", "object", "map", "array", "tuple", "anyOf", "oneOf", "union", "ref"]
    kind = r.choice(kinds)
    sub = lambda: random_schema(r, depth + 1)
    if kind == "string":
        low = r.randrange(4)
        return {"type": "string", "minLength": low, "maxLength": low + r.randrange(8)}
    if kind == "pattern":
        return {"type": "string", "pattern": r.choice([
            r"^[A-Z][a-z]{1,8}$", r"^\d{4}-\d{2}-\d{2}$", r"^(yes|no|maybe)$", r"^[^a-z]{2,4}$",
            r"[0-9a-f]{4}", r"^\w+@\w+\.(com|org)$"])}
    if kind == "integer":
        low = r.randrange(-2000, 2000)
        schema = {"type": "integer", "minimum": low, "maximum": low + r.randrange(3000)}
        if r.random() < 0.3:
            schema["exclusiveMinimum"] = low - 1
            del schema["minimum"]
        return r.choice([schema, {"type": "integer"}])
    if kind == "decimal":
        low = r.uniform(-5, 5) * 10 ** r.randrange(-3, 4)
        low = r.choice([low, round(low, 2), round(low)])
        high = r.choice([low + 10 ** r.randrange(-3, 4), round(low + 5, 1)])
        schema = {"type": "number", r.choice(["minimum", "exclusiveMinimum"]): low,
                  r.choice(["maximum", "exclusiveMaximum"]): high}
        if r.random() < 0.3:
            del schema[r.choice(list(schema)[1:])]
        return schema
    if kind == "large":
        low = r.choice([10**15, 1e15, 2**53, -10**16])
        return {"type": r.choice(["integer", "number"]), r.choice(["minimum", "exclusiveMinimum"]): low,
                "maximum": low + r.choice([1, 17, 10**15])}
    if kind == "union":
        tags = r.sample(range(100), 4)
        return {"oneOf": [
            {"type": "object", "required": ["kind", "value"], "additionalProperties": False,
             "properties": {"kind": {"const": tags[0]}, "value": sub()}},
            {"type": "object", "required": ["kind"],
             "properties": {"kind": {"enum": tags[1:3]}, "more": sub()}},
            {"enum": ["none", tags[3]]}, {"type": "null"}]}
    if kind == "multiple":
        low = r.randrange(-10 ** 6, 10 ** 6)
        schema = {"type": r.choice(["integer", "number"]), "multipleOf": r.randrange(1, 200)}
        if r.random() < 0.7:
            schema.update(minimum=low, maximum=low + 200 + 10 ** r.randrange(6))
        return schema
    if kind == "set":
        values = [r.randrange(30) for _ in range(r.randrange(1, 9))]
        low = r.randrange(len(set(values)) + 1)
        return {"type": "array", "uniqueItems": True, "items": {"enum": values}, "minItems": low,
                "maxItems": low + r.randrange(4)}
    if kind == "types":
        return {"type": r.sample(["null", "boolean", "integer"], 2), "maximum": 50}
    if kind == "enum":
        return {"enum": [random_value(r) for _ in range(r.randrange(1, 5))]}
    if kind == "const":
        return {"const": random_value(r)}
    if kind == "object":
        names = r.sample(WORDS, r.randrange(1, 5))
        schema = {"type": "object", "properties": {name: sub() for name in names},
                  "required": r.sample(names, r.randrange(len(names) + 1))}
        if r.random() < 0.7:
            schema["additionalProperties"] = False
        return schema
    if kind == "map":
        return {"type": "object", "additionalProperties": sub(), "maxProperties": r.randrange(3)}
    if kind == "array":
        low = r.randrange(3)
        return {"type": "array", "items": sub(), "minItems": low, "maxItems": low + r.randrange(3)}
    if kind == "tuple":
        return {"prefixItems": [sub(), sub()], "items": False, "type": "array",
                "minItems": r.randrange(3)}
    if kind == "anyOf":
        return {"anyOf": [sub(), sub()]}
    if kind == "oneOf":
        return {"oneOf": [{"type": "boolean"}, {"type": "string", "maxLength": 4}]}
    if kind == "ref":
        return {"$ref": "#/$defs/a%20~1tree"}
    return {"type": kind, "description": "of a type alone"}


def make_schema(r):
    schema = random_schema(r)
    tree = {"type": "object", "required": ["leaf"], "additionalProperties": False,
            "properties": {"leaf": {"type": "integer", "minimum": 0, "maximum": 9},
                           "more": {"type": "array", "items": {"$ref": "#/$defs/a%20~1tree"},
                                    "maxItems": 2}}}
    return {"$defs": {"a /tree": tree}, "allOf": [schema]}


def generate(stub, pb, text, constraint, seed):
    request = pb.GenerateRequest(text=text, constraint=constraint)
    request.sampling.temperature = 1.2
    request.sampling.seed = seed
    request.stopping.max_new_tokens = MAX_NEW_TOKENS
    output = ""
    for event in stub.Generate(request, timeout=300):
        output += event.delta.text
        if event.HasField("finished"):
            return output, event.finished.finish_reason
    raise AssertionError("no finished event")


def check_schema(stub, pb, seed):
    schema = make_schema(random.Random(seed))
    # An empty prompt starts the text: its first token's space is not shown.
    text = "" if seed % 3 == 0 else "The answer in JSON is "
    output, reason = generate(stub, pb, text, {"json_schema": json.dumps(schema)}, seed)
    if reason == pb.FINISH_REASON_LENGTH:
        return False
    assert reason == pb.FINISH_REASON_EOS, reason
    try:
        jsonschema.Draft202012Validator(schema).validate(json.loads(output))
    except (ValueError, jsonschema.ValidationError) as error:
        raise AssertionError(f"seed {seed}: {schema} gave {output!r}: {error}") from error
    return True


# What \\s is to ECMA-262.
SPACES = "\\t-\\r \\u00a0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000\\ufeff"
CLASSES = {r"\d": "[0-9]", r"\D": "[^0-9]", r"\w": "[0-9A-Za-z_]", r"\W": "[^0-9A-Za-z_]",
           r"\s": f"[{SPACES}]", r"\S": f"[^{SPACES}]", ".": r"[^\n\r\u2028\u2029]"}


def random_expression(r, depth=0):
    """A regular expression, and the same as re writes it."""
    kind = r.choice(["text", "class", "set"] + 3 * ["join", "either", "repeat"] * (depth < 4))
    if kind == "text":
        return 2 * (r.choice(["a", "b", "0", "_", "-", " ", "é", "😀", "\\.", "\\x41"]),)
    if kind == "class":
        return r.choice(list(CLASSES.items()))
    if kind == "set":
        start, items = r.choice(["[", "[^"]), r.sample(["a-f", "0", "é", "_", r"\s"], 2)
        ours = start + "".join(items) + "]"
        return ours, ours.replace(r"\s", SPACES)
    parts = [random_expression(r, depth + 1) for _ in range(1 if kind == "repeat" else 3)]
    if kind == "join":
        return tuple("".join(written) for written in zip(*parts))
    if kind == "either":
        return tuple("(" + "|".join(written) + ")" for written in zip(*parts))
    count = r.choice(["*", "+", "?", "{2}", "{1,}", "{0,3}", "*?"])
    return tuple(f"(?:{written}){count}" for written in parts[0])


def check_expression(stub, pb, seed):
    ours, theirs = random_expression(random.Random(seed))
    output, reason = generate(stub, pb, "Once", {"regex": ours}, seed)
    if reason == pb.FINISH_REASON_LENGTH:
        return False
    assert re.fullmatch(theirs, output), f"seed {seed}: {ours!r} gave {output!r}"
    return True


def check_patterns(stub, pb):
    for seed, pattern in enumerate([r"[A-Z][a-z]+( [a-z]+){2}\.", r"\d{3}-\d{4}", r"(ha){2,5}!?"]):
        output, reason = generate(stub, pb, "Once", {"regex": pattern}, seed)
        assert reason == pb.FINISH_REASON_EOS and re.fullmatch(pattern, output), (pattern, output)
    grammar = 'root ::= "(" inner ")"\ninner ::= "" | [a-c] | "(" inner ")"'
    output, reason = generate(stub, pb, "Once", {"grammar": grammar}, 1)
    assert re.fullmatch(r"\(+[a-c]?\)+", output) and output.count("(") == output.count(")"), output


def main():
    with live_server.connect(__doc__) as channel:
        from mmfree.v1 import inference_pb2 as pb, inference_pb2_grpc
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        check_patterns(stub, pb)
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            matched = list(pool.map(lambda seed: check_expression(stub, pb, seed),
                                    range(EXPRESSIONS)))
            whole = list(pool.map(lambda seed: check_schema(stub, pb, seed), range(SCHEMAS)))
        # The others were cut at the length: a few may be, most must not.
        assert sum(matched) > 0.6 * EXPRESSIONS, f"only {sum(matched)} of {EXPRESSIONS} were finished"
        assert sum(whole) > 0.9 * SCHEMAS, f"only {sum(whole)} of {SCHEMAS} were finished"
    print(f"{sum(whole)} of {SCHEMAS} outputs were finished, parsed and validated")


if __name__ == "__main__":
    main()
