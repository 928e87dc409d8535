"""A client that knows nothing but the address can list the services and call them, as grpcurl does."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from hasgpu_system import System, pack_bytes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


def test_infer_with_messages_learnt_by_reflection(system: System) -> None:
    with grpc.insecure_channel(system.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = set(database.get_services())
        assert {
            "inference.GRPCInferenceService",
            "hasgpu.gateway.v1.FunctionService",
            "grpc.health.v1.Health",
        } <= services
        pool = DescriptorPool(database)
        method = pool.FindServiceByName("inference.GRPCInferenceService").FindMethodByName("ModelInfer")
        request_class, response_class = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        request = request_class(model_name="tricky")
        request.inputs.add(name="text", datatype="BYTES", shape=[1])
        request.raw_input_contents.append(pack_bytes([b"by reflection"]))
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=request_class.SerializeToString,
            response_deserializer=response_class.FromString,
        )
        answer = call(request, timeout=20)
    assert answer.raw_output_contents[0] == pack_bytes([b"by reflection"])
