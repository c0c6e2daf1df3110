#!/usr/bin/env python3
"""A Python client of a real server, over stubs made from the protos at test time.

Shows that another language's gRPC library understands the services, the typed error details, the
health protocol and reflection. Exits with 77 (skipped) where grpcio-tools is not installed.
"""

import live_server  # first, as it skips the test where gRPC is missing

import grpc


def check_generation(stub, pb):
    request = pb.GenerateRequest(text="Once upon a time")
    request.sampling.temperature = 0
    request.stopping.max_new_tokens = 12
    request.response.return_token_ids = True
    events = list(stub.Generate(request))
    assert events[0].WhichOneof("event") == "started", events[0]
    assert events[-1].WhichOneof("event") == "finished", events[-1]
    assert events[-1].finished.finish_reason == pb.FINISH_REASON_LENGTH
    assert not events[-1].finished.HasField("session_turn")
    deltas = [event.delta for event in events[1:-1]]
    text = "".join(delta.text for delta in deltas)
    ids = [token for delta in deltas for token in delta.token_ids]
    assert len(ids) == 12
    decoded = stub.Detokenize(pb.DetokenizeRequest(token_ids=ids, continuation=True)).text
    assert text == decoded, (text, decoded)

    stream = stub.Generate(
        pb.GenerateRequest(text="Once", stopping={"max_new_tokens": 60000, "ignore_eos": True}))
    next(stream)
    stream.cancel()


def check_error(stub, pb, status_pb, details_pb):
    request = pb.GenerateRequest(text="Once", sampling={"temperature": float("nan"), "top_p": 2.0})
    try:
        list(stub.Generate(request))
        raise AssertionError("NaN was accepted")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
        trailers = dict(error.trailing_metadata())
        status = status_pb.Status.FromString(trailers["grpc-status-details-bin"])
        violations = details_pb.BadRequest()
        assert status.details[0].Unpack(violations)
        fields = [violation.field for violation in violations.field_violations]
        assert fields == ["sampling.temperature", "sampling.top_p"], fields


def check_health(channel, health_pb):
    check = channel.unary_unary("/grpc.health.v1.Health/Check",
                                request_serializer=health_pb.HealthCheckRequest.SerializeToString,
                                response_deserializer=health_pb.HealthCheckResponse.FromString)
    for service in ["", "tales"]:
        response = check(health_pb.HealthCheckRequest(service=service))
        assert response.status == health_pb.HealthCheckResponse.SERVING, (service, response)


def check_reflection(channel):
    # ServerReflectionRequest{list_services: "*"}.
    call = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    response = next(call(iter([b"\x3a\x01*"])))
    assert b"mmfree.v1.InferenceService" in response, response


def main():
    with live_server.connect(__doc__) as channel:
        from google.rpc import error_details_pb2, status_pb2
        from grpc.health.v1 import health_pb2
        from mmfree.v1 import inference_pb2, inference_pb2_grpc, model_pb2, model_pb2_grpc
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        check_generation(stub, inference_pb2)
        check_error(stub, inference_pb2, status_pb2, error_details_pb2)
        models = model_pb2_grpc.ModelServiceStub(channel)
        assert models.ListModels(model_pb2.ListModelsRequest()).models[0].name == "tales"
        check_health(channel, health_pb2)
        check_reflection(channel)
    print("all checks passed")


if __name__ == "__main__":
    main()
