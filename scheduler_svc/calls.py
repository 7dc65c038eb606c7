"""A service's calls for a server, as its description on the wire has them."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass


def handler(service: ServiceDescriptor, **methods: Any) -> grpc.GenericRpcHandler[Any, Any]:
    """Serves `service` by these methods, each under the name of its call.

    Where both sides stream, responses are bytes already: what goes to several peers is encoded once.
    """
    rpcs = {name: _rpc(service.methods_by_name[name], method) for name, method in methods.items()}
    return grpc.method_handlers_generic_handler(service.full_name, rpcs)


def _rpc(call: MethodDescriptor, method: Any) -> Any:
    streams = call.client_streaming, call.server_streaming
    request, response = GetMessageClass(call.input_type), GetMessageClass(call.output_type)
    make: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[streams]
    return make(method, request.FromString, None if all(streams) else response.SerializeToString)
