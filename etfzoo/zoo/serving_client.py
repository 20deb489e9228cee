"""Client of TF Serving's Predict API, over gRPC or REST.

client = etfzoo.zoo.serving_client.connect("localhost:8501", "flowers", protocol="rest")
client.predict([Path("rose.jpg").read_bytes()])["labels"]
"""

import base64
import http.client
import json
import threading
import urllib.parse

import numpy as np

from etfzoo.errors import EtfzooError, unknown

PORTS = {"grpc": 8500, "rest": 8501}


class RequestFailed(EtfzooError):
    """No answer, or a refusal; `code` is gRPC's name of the status, e.g. `"INVALID_ARGUMENT"`."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


def connect(
    server: str | None,
    model: str,
    protocol: str = "grpc",
    version: int | None = None,
    version_label: str | None = None,
    timeout: float = 10.0,
):
    """A client of one model. Nothing is sent before its first request; threads may share it.

    Args:
        server: `host:port`; None is this machine and the protocol's usual port (8500 or 8501).
        model: name in the server's configuration.
        protocol: `"grpc"` (needs the package tensorflow-serving-api) or `"rest"`.
        version: version number; None leaves the choice to the server: the highest one.
        version_label: label of a version instead, e.g. `"stable"`.
        timeout: seconds that an answer may take.

    Returns:
        An object with `predict(images, signature="serving_bytes")`: from a list of n encoded
        images to a dict of arrays by name of the output, `[n, ...]` each; text is `str`.
        It raises RequestFailed.

    Raises:
        EtfzooError: bad arguments, or a package is missing.
    """
    if protocol not in PORTS:
        raise unknown("protocol", protocol, PORTS)
    if version is not None and version_label is not None:
        raise EtfzooError("give a version or a version label, not both")
    host, colon, port = (server or "localhost").partition(":")
    if not host or (colon and not port.isdigit()):
        raise EtfzooError(f"the server is written host:port; got {server!r}")
    address = f"{host}:{port or PORTS[protocol]}"
    kind = {"grpc": _Grpc, "rest": _Rest}[protocol]
    return kind(address, model, version, version_label, timeout)


class _Client:
    def __init__(self, address, model, version, label, timeout):
        self._address, self._model, self._timeout = address, model, timeout
        self._version, self._label = version, label

    def _failed(self, code, message):
        which = f" version {self._version}" if self._version is not None else ""
        which += f" labelled {self._label!r}" if self._label is not None else ""
        text = " ".join(str(message).split("[[{{")[0].split())[:300]  # not the graph's node
        return RequestFailed(
            code,
            {
                "UNAVAILABLE": f"no server answers at {self._address}: {text}; is it running, "
                "and is this the port of the protocol?",
                "DEADLINE_EXCEEDED": f"{self._address} gave no answer within {self._timeout:g} s; "
                "allow it more time, or send it less at once",
                "NOT_FOUND": f"{self._address} serves no model {self._model!r}{which}: {text}",
            }.get(code, f"{self._address} refused the request ({code}): {text}"),
        )


class _Grpc(_Client):
    def __init__(self, *args):
        super().__init__(*args)
        try:
            import grpc
            from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
        except ImportError as error:
            # With its dependencies it would bring `tensorflow` to where `tensorflow-cpu` is.
            raise EtfzooError(
                f"gRPC needs a package ({error}): pip install --no-deps tensorflow-serving-api "
                "grpcio, or take the protocol rest"
            ) from error
        self._request, self._rpc_error = predict_pb2.PredictRequest, grpc.RpcError
        no_limit = [(f"grpc.max_{way}_message_length", -1) for way in ("send", "receive")]
        self._channel = grpc.insecure_channel(self._address, no_limit)
        self._stub = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)

    def predict(self, images, signature="serving_bytes"):
        import tensorflow as tf

        request = self._request()
        request.model_spec.name = self._model
        request.model_spec.signature_name = signature
        if self._version is not None:
            request.model_spec.version.value = self._version
        if self._label is not None:
            request.model_spec.version_label = self._label
        request.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto(list(images), tf.string))
        try:
            response = self._stub.Predict(request, timeout=self._timeout)
        except self._rpc_error as error:
            raise self._failed(error.code().name, error.details()) from error
        outputs = {name: tf.make_ndarray(tensor) for name, tensor in response.outputs.items()}
        return {
            name: np.char.decode(y.astype(bytes), "utf-8", "replace") if y.dtype == object else y
            for name, y in outputs.items()
        }


class _Rest(_Client):
    _CODES = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 429: "RESOURCE_EXHAUSTED"}
    _CODES |= {503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED"}

    def __init__(self, *args):
        super().__init__(*args)
        self._threads = threading.local()  # a connection each
        quote = urllib.parse.quote
        self._path = f"/v1/models/{quote(self._model, safe='')}"
        if self._version is not None:
            self._path += f"/versions/{self._version}"
        if self._label is not None:
            self._path += f"/labels/{quote(self._label, safe='')}"

    def predict(self, images, signature="serving_bytes"):
        encoded = [{"b64": base64.b64encode(image).decode()} for image in images]
        body = {"signature_name": signature, "inputs": {"image_bytes": encoded}}
        try:
            status, content = self._post(json.dumps(body))
        except TimeoutError as error:
            raise self._failed("DEADLINE_EXCEEDED", error) from error
        except (OSError, http.client.HTTPException) as error:
            raise self._failed("UNAVAILABLE", error) from error
        try:
            answer = json.loads(content)
            if status == 200:
                outputs = answer["outputs"]
                # The API leaves the name out where there is one output only.
                outputs = outputs if isinstance(outputs, dict) else {"outputs": outputs}
                return {name: np.asarray(rows) for name, rows in outputs.items()}
            message = answer["error"]
        except (ValueError, KeyError, TypeError):
            message = f"HTTP status {status} without TF Serving's JSON"
        raise self._failed(self._CODES.get(status, f"HTTP {status}"), message)

    def _post(self, body):
        connection = getattr(self._threads, "connection", None)
        if connection is None:
            connection = http.client.HTTPConnection(self._address, timeout=self._timeout)
            self._threads.connection = connection
        used = connection.sock is not None
        try:
            connection.request("POST", f"{self._path}:predict", body)
            response = connection.getresponse()
            return response.status, response.read()
        except (ConnectionError, http.client.RemoteDisconnected):
            connection.close()
            if not used:
                raise
            return self._post(body)  # the server had closed an idle connection
        except BaseException:
            connection.close()
            raise
