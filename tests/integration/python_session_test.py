#!/usr/bin/env python3
"""The Python client's sessions on a real server.

Exits with 77 (skipped) where grpcio-tools is not installed.
"""

import pathlib
import sys

import live_server  # first, as it skips the test where gRPC is missing

import grpc

GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}


def expect(code, function):
    try:
        function()
    except grpc.RpcError as error:
        assert error.code() == code, error
        return
    raise AssertionError(f"{code} expected")


def check_turns(client):
    whole = client.create_session(system_prompt="Once upon a time")
    assert whole.id and whole.turn == 0
    parts = []
    for text in whole.stream(" there was", **GREEDY):
        assert text
        parts.append(text)
    first = whole.last
    # Tokens that are ready together come together, so there may be a single part.
    assert parts and first.text == "".join(parts) and first.number == 1, first
    assert first.finished.usage.completion_tokens == 8, first
    second = whole.generate(" The king", **GREEDY)
    assert second.number == whole.turn == 2
    assert whole.refresh().turn == 2

    # From the end of turn 1 everything says the same again: a fork, a copy elsewhere, a rewind.
    fork = whole.fork("fork", turn=1)
    assert (fork.id, fork.turn) == ("fork", 1)
    copy = client.import_session(whole.export(turn=1), "copy", ttl=60)
    assert copy.info.expire_time.seconds - copy.info.last_use_time.seconds == 60, copy.info
    assert len(whole.export(dtype="f16")) < 0.6 * len(whole.export())
    whole.rewind(1)
    for session in [fork, copy, whole]:
        turn = session.generate(" The king", **GREEDY)
        assert (turn.text, turn.number) == (second.text, 2), (session.id, turn)

    # Who attaches to it goes on where it is.
    attached = client.session("fork")
    assert attached.turn == 2
    attached.generate(" and", **GREEDY)
    # The other object does not know that turn.
    expect(grpc.StatusCode.ABORTED, lambda: fork.generate(" but", **GREEDY))
    assert fork.refresh().turn == 3
    fork.generate(" but", **GREEDY)


def check_options(client):
    session = client.create_session("options")
    turn = session.generate("One two", stop_strings=["e"], include_stop=True, max_new_tokens=60,
                            seed=3, top_k=5, repetition_penalty=1.2)
    assert "e" not in turn.text[:-1], turn
    for wrong in ["temprature", "session_id", "candidates"]:
        try:
            session.stream("x", **{wrong: 1})
            raise AssertionError(f"{wrong} was taken")
        except TypeError as error:
            assert wrong in str(error)
    expect(grpc.StatusCode.INVALID_ARGUMENT, lambda: session.generate("x", top_p=2.0))
    assert session.refresh().turn == 1
    # What is not read to its end is not committed.
    stream = session.stream("Once", max_new_tokens=60000, ignore_eos=True)
    next(stream)
    stream.close()
    assert session.turn == 1


def check_list_and_delete(client):
    ids = [session.id for session in client.sessions(page_size=2)]
    assert len(ids) == 4 and {"fork", "copy", "options"} < set(ids), ids
    for session in client.sessions():
        session.delete()
        expect(grpc.StatusCode.NOT_FOUND, session.refresh)
    assert not list(client.sessions())


def main():
    with live_server.connect(__doc__) as channel:
        sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "client" / "python"))
        import mmfree_client
        with mmfree_client.Client(channel) as client:
            check_turns(client)
            check_options(client)
            check_list_and_delete(client)
    print("all checks passed")


if __name__ == "__main__":
    main()
