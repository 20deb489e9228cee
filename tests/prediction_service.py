"""A thin PredictionService for the tests, which TF Serving itself is not part of.

It speaks TF Serving's protocols, gRPC with the stubs of tensorflow-serving-api and Predict over
REST, as their documentation says, and hands the tensors to the C++ loader (see c_api.py); Keras
takes no part. What TF Serving does beyond that (batching, versions that come and go) is not here.
"""

import base64
import concurrent.futures
import contextlib
import http.server
import json
import re
import threading

import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from c_api import StatusError

_HTTP = {"INVALID_ARGUMENT": 400, "NOT_FOUND": 404, "FAILED_PRECONDITION": 400}
_URL = re.compile(r"/v1/models/(?P<name>[^/:]+)(/versions/(?P<v>\d+)|/labels/(?P<label>[^/:]+))?")


class Models:
    """What is served: `{name: {version: Loader}}` and `{name: {label: version}}`."""

    def __init__(self, loaders, labels=None):
        self._loaders, self._labels = loaders, labels or {}

    def find(self, name, version=None, label=None):
        """The chosen version and its loader, the highest by default; a StatusError if none."""
        versions = self._loaders.get(name, {})
        if label:
            version = self._labels.get(name, {}).get(label)
            if version is None:
                raise StatusError(
                    "INVALID_ARGUMENT", f"Unrecognized servable version label: {label}"
                )
        which = f"Specific({name}, {version})" if version is not None else f"Latest({name})"
        version = max(versions, default=None) if version is None else version
        if version not in versions:
            raise StatusError("NOT_FOUND", f"Servable not found for request: {which}")
        return version, versions[version]


class _Grpc(prediction_service_pb2_grpc.PredictionServiceServicer):
    def __init__(self, models):
        self._models = models

    def Predict(self, request, context):  # noqa: N802 (the protocol's name)
        spec = request.model_spec
        try:
            version, loader = self._models.find(
                spec.name,
                spec.version.value if spec.HasField("version") else None,
                spec.version_label,
            )
            signature = spec.signature_name or "serving_default"
            inputs = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
            outputs = loader.run(signature, **inputs)
        except StatusError as error:
            context.abort(grpc.StatusCode[error.code], error.message)
        response = predict_pb2.PredictResponse()
        response.model_spec.name, response.model_spec.signature_name = spec.name, signature
        response.model_spec.version.value = version
        for name, value in outputs.items():
            dtype = tf.string if value.dtype == object else None
            response.outputs[name].CopyFrom(tf.make_tensor_proto(value, dtype))
        return response


def _tensor(value, dtype):
    """JSON to an array: nested lists, with `{"b64": ...}` for bytes."""

    def leaf(x):
        if isinstance(x, list):
            return [leaf(y) for y in x]
        return base64.b64decode(x["b64"]) if isinstance(x, dict) else x

    return np.array(leaf(value), object if dtype == "string" else dtype)


def _json(value, name):
    """An array as JSON; strings of an output `..._bytes` are base64."""
    if isinstance(value, list):
        return [_json(x, name) for x in value]
    if not isinstance(value, bytes):
        return value
    if name.endswith("_bytes"):
        return {"b64": base64.b64encode(value).decode()}
    return value.decode()


def _predict_json(models, path, body):
    """The answer to a REST request, as the API's document describes it."""
    url = _URL.match(path)
    if url is None or path[url.end() :] != ":predict":
        raise StatusError("NOT_FOUND", f"Malformed request: POST {path}")
    version, label = url["v"], url["label"]
    _, loader = models.find(url["name"], int(version) if version else None, label)
    try:
        request = json.loads(body)
        name = request.get("signature_name", "serving_default")
        if name not in loader.signatures:
            loader.run(name)  # which refuses it
        infos = loader.signatures[name]["inputs"]
        rows = "instances" in request
        if rows == ("inputs" in request):
            raise StatusError("INVALID_ARGUMENT", "either 'instances' or 'inputs' is needed")
        columns = request["instances" if rows else "inputs"]
        if rows and all(isinstance(row, dict) and "b64" not in row for row in columns):
            columns = {key: [row[key] for row in columns] for key in columns[0]}
        if not isinstance(columns, dict) or "b64" in columns:
            columns = {next(iter(infos)): columns}
        dtypes = {key: infos[key][1] if key in infos else None for key in columns}
        inputs = {key: _tensor(value, dtypes[key]) for key, value in columns.items()}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise StatusError("INVALID_ARGUMENT", f"JSON request cannot be read: {error}") from None
    outputs = {k: _json(v.tolist(), k) for k, v in loader.run(name, **inputs).items()}
    if rows:
        outputs = [
            dict(zip(outputs, values, strict=True)) if len(outputs) > 1 else values[0]
            for values in zip(*outputs.values(), strict=True)
        ]
        return {"predictions": outputs}
    return {"outputs": outputs if len(outputs) > 1 else next(iter(outputs.values()))}


class _Rest(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):  # noqa: N802
        body = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            status, answer = 200, _predict_json(self.server.models, self.path, body)
        except StatusError as error:
            status, answer = _HTTP.get(error.code, 500), {"error": error.message}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # a client that waits no longer
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(models: Models):
    """Serves until the block ends: `{"grpc": address, "rest": address}`."""
    no_limit = [(f"grpc.max_{way}_message_length", -1) for way in ("send", "receive")]
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(4), options=no_limit)
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(_Grpc(models), server)
    port = server.add_insecure_port("localhost:0")
    server.start()
    with http.server.ThreadingHTTPServer(("localhost", 0), _Rest) as rest:
        rest.models = models
        threading.Thread(target=rest.serve_forever, daemon=True).start()
        try:
            yield {"grpc": f"localhost:{port}", "rest": f"localhost:{rest.server_port}"}
        finally:
            rest.shutdown()
            server.stop(None).wait()
