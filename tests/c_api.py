"""TensorFlow's C++ SavedModel loader, in a process that never imports TensorFlow's Python package.

    with Loader(folder) as loader:
        loader.run("serving_default", images=pixels)["logits"]

The process calls `TF_LoadSessionFromSavedModel` of the C API in the shared libraries of the pip
package: the loader that TF Serving's servables are built on. Names of inputs and outputs come from
the SignatureDefs in the MetaGraphDef that it returns. Requests and answers are pickled dicts of
NumPy arrays; strings are arrays of `bytes` objects.
"""

import contextlib
import ctypes
import importlib.util
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import numpy.random  # noqa: F401 (before the shared libraries: the other order crashes)

STRING = 7
DTYPES = {  # numbers of tensorflow.DataType
    1: "float32", 2: "float64", 3: "int32", 4: "uint8", 5: "int16", 6: "int8", 9: "int64",
    10: "bool", 17: "uint16", 19: "float16", 22: "uint32", 23: "uint64",
}  # fmt: skip
NUMBERS = {np.dtype(name): number for number, name in DTYPES.items()}
CODES = (
    "OK CANCELLED UNKNOWN INVALID_ARGUMENT DEADLINE_EXCEEDED NOT_FOUND ALREADY_EXISTS "
    "PERMISSION_DENIED RESOURCE_EXHAUSTED FAILED_PRECONDITION ABORTED OUT_OF_RANGE UNIMPLEMENTED "
    "INTERNAL UNAVAILABLE DATA_LOSS UNAUTHENTICATED"
).split()


class StatusError(Exception):
    """A status that is not OK: `code` as gRPC spells it, and `message`."""

    def __init__(self, code, message):
        super().__init__(code, message)
        self.code, self.message = code, message


class Loader:
    """A process that has loaded one version folder.

    Attributes:
        signatures: by name `{"inputs": {name: (tensor, dtype, shape)}, "outputs": ...}`.
        modules: names of the top-level modules that the process has imported after loading.
    """

    def __init__(self, folder):
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        )
        try:
            self.signatures, self.modules = self._answer()
        except BaseException:
            self.close()
            raise

    def run(self, signature_name, **inputs) -> dict[str, np.ndarray]:
        """Outputs of a signature by name.

        Raises:
            StatusError: what the session answered; an unknown signature and other inputs than its
                own are refused before, with the codes of TF Serving.
        """
        with self._lock:
            pickle.dump((signature_name, inputs), self._process.stdin)
            self._process.stdin.flush()
            return self._answer()

    def resident_kib(self) -> int:
        """Memory of the process: VmRSS in KiB."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])

    def peak_kib(self) -> int:
        """Highest VmRSS so far (VmHWM), in KiB."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0])

    def close(self):
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(60)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _answer(self):
        try:
            answer = pickle.load(self._process.stdout)
        except EOFError:
            raise RuntimeError(f"the loader died with {self._process.wait(60)}") from None
        if isinstance(answer, StatusError):
            raise answer
        return answer


class _Buffer(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("length", ctypes.c_size_t), ("free", ctypes.c_void_p)]


class _Output(ctypes.Structure):
    _fields_ = [("operation", ctypes.c_void_p), ("index", ctypes.c_int)]


def _load_libraries():
    """The pip package's two shared libraries as one object; found without importing anything."""
    folder = Path(importlib.util.find_spec("tensorflow").submodule_search_locations[0])
    framework, cc = (
        ctypes.CDLL(str(next(folder.glob(f"libtensorflow_{name}.so*"))))
        for name in ("framework", "cc")
    )
    pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    shape, text = ctypes.POINTER(ctypes.c_int64), ctypes.c_char_p
    texts = ctypes.POINTER(text)
    buffer, output = ctypes.POINTER(_Buffer), ctypes.POINTER(_Output)
    prototypes = {
        "TF_NewStatus": (pointer,),
        "TF_DeleteStatus": (None, pointer),
        "TF_GetCode": (integer, pointer),
        "TF_Message": (text, pointer),
        "TF_NewBuffer": (buffer,),
        "TF_DeleteBuffer": (None, buffer),
        "TF_NewGraph": (pointer,),
        "TF_NewSessionOptions": (pointer,),
        "TF_LoadSessionFromSavedModel": (
            pointer, pointer, pointer, text, texts, integer, pointer, buffer, pointer,
        ),
        "TF_GraphOperationByName": (pointer, pointer, text),
        "TF_SessionRun": (
            None, pointer, pointer, output, ctypes.POINTER(pointer), integer,
            output, ctypes.POINTER(pointer), integer, pointer, integer, pointer, pointer,
        ),
        "TF_AllocateTensor": (pointer, integer, shape, integer, size),
        "TF_DeleteTensor": (None, pointer),
        "TF_TensorData": (pointer, pointer),
        "TF_TensorByteSize": (size, pointer),
        "TF_TensorType": (integer, pointer),
        "TF_NumDims": (integer, pointer),
        "TF_Dim": (ctypes.c_int64, pointer, integer),
        "TF_StringInit": (None, pointer),
        "TF_StringCopy": (None, pointer, text, size),
        "TF_StringDealloc": (None, pointer),
        "TF_StringGetDataPointer": (pointer, pointer),
        "TF_StringGetSize": (size, pointer),
    }  # fmt: skip
    for name, (result, *arguments) in prototypes.items():
        function = getattr(cc, name, None) or getattr(framework, name)
        function.restype, function.argtypes = result, arguments
        setattr(cc, name, function)
    return cc


class _Session:
    """A SavedModel's session and its signatures."""

    _TSTRING = 24  # bytes of a TF_TString

    def __init__(self, folder):
        self._c = c = _load_libraries()
        self._graph, meta_graph = c.TF_NewGraph(), c.TF_NewBuffer()
        tags = (ctypes.c_char_p * 1)(b"serve")
        with self._status() as status:
            self._session = c.TF_LoadSessionFromSavedModel(
                c.TF_NewSessionOptions(), None, folder.encode(), tags, 1, self._graph, meta_graph,
                status,
            )  # fmt: skip
        encoded = ctypes.string_at(meta_graph.contents.data, meta_graph.contents.length)
        c.TF_DeleteBuffer(meta_graph)
        self.signatures = parse_signatures(encoded)

    def run(self, name, inputs):
        signature = self.signatures.get(name)
        # As TF Serving does before it runs the session (servables/tensorflow/predict_util.cc).
        if signature is None:
            raise StatusError("FAILED_PRECONDITION", f'Serving signature key "{name}" not found.')
        if inputs.keys() != signature["inputs"].keys():
            extra = sorted(inputs.keys() - signature["inputs"].keys())
            missing = sorted(signature["inputs"].keys() - inputs.keys())
            raise StatusError(
                "INVALID_ARGUMENT",
                f"inputs do not match the signature; sent extra: {extra}, missing: {missing}",
            )
        c, wanted = self._c, signature["outputs"]
        tensors = {key: self._tensor(value) for key, value in inputs.items()}
        results = (ctypes.c_void_p * len(wanted))()
        try:
            with self._status() as status:
                c.TF_SessionRun(
                    self._session, None,
                    self._endpoints(signature["inputs"][key] for key in tensors),
                    (ctypes.c_void_p * len(tensors))(*tensors.values()), len(tensors),
                    self._endpoints(wanted.values()), results, len(wanted), None, 0, None, status,
                )  # fmt: skip
            return {key: self._array(r) for key, r in zip(wanted, results, strict=True)}
        finally:
            for tensor in tensors.values():
                self._free(tensor)
            for result in filter(None, results):
                c.TF_DeleteTensor(result)

    @contextlib.contextmanager
    def _status(self):
        status = self._c.TF_NewStatus()
        try:
            yield status
            if code := self._c.TF_GetCode(status):
                message = self._c.TF_Message(status).decode(errors="replace")
                raise StatusError(CODES[code], message)
        finally:
            self._c.TF_DeleteStatus(status)

    def _endpoints(self, infos):
        pairs = [tensor.rsplit(":", 1) for tensor, _, _ in infos]
        find = self._c.TF_GraphOperationByName
        found = [_Output(find(self._graph, name.encode()), int(index)) for name, index in pairs]
        return (_Output * len(found))(*found)

    def _tensor(self, array):
        c, array = self._c, np.ascontiguousarray(array).reshape(np.shape(array))
        dims = (ctypes.c_int64 * array.ndim)(*array.shape)
        if array.dtype != object:
            number = NUMBERS[array.dtype]
            tensor = c.TF_AllocateTensor(number, dims, array.ndim, array.nbytes)
            ctypes.memmove(c.TF_TensorData(tensor), array.ctypes.data, array.nbytes)
            return tensor
        tensor = c.TF_AllocateTensor(STRING, dims, array.ndim, self._TSTRING * array.size)
        for place, value in zip(self._strings(tensor, array.size), array.flat, strict=True):
            c.TF_StringInit(place)
            c.TF_StringCopy(place, value, len(value))
        return tensor

    def _strings(self, tensor, count):
        start = self._c.TF_TensorData(tensor)
        return [start + self._TSTRING * i for i in range(count)]

    def _free(self, tensor):
        c = self._c
        if c.TF_TensorType(tensor) == STRING:  # those of an input are the caller's
            for place in self._strings(tensor, c.TF_TensorByteSize(tensor) // self._TSTRING):
                c.TF_StringDealloc(place)
        c.TF_DeleteTensor(tensor)

    def _array(self, tensor):
        c = self._c
        shape = [c.TF_Dim(tensor, i) for i in range(c.TF_NumDims(tensor))]
        number = c.TF_TensorType(tensor)
        if number != STRING:
            data = ctypes.string_at(c.TF_TensorData(tensor), c.TF_TensorByteSize(tensor))
            return np.frombuffer(data, DTYPES[number]).reshape(shape)
        array = np.empty(shape, object)
        array.flat = [
            ctypes.string_at(c.TF_StringGetDataPointer(place), c.TF_StringGetSize(place))
            for place in self._strings(tensor, array.size)
        ]
        return array


def parse_signatures(meta_graph: bytes) -> dict:
    """The SignatureDefs of an encoded MetaGraphDef.

    TensorFlow's generated classes would import TensorFlow. protobuf needs to be told no more than
    the fields that are read; numbers as in TensorFlow's meta_graph.proto and tensor_shape.proto.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    messages = {  # message: {field: (number, type)}; a map is repeated pairs of key and value
        "Dim": {"size": (1, "int64")},
        "Shape": {"dim": (2, "Dim*"), "unknown_rank": (3, "bool")},
        "TensorInfo": {"name": (1, "string"), "dtype": (2, "int32"), "shape": (3, "Shape")},
        "Tensors": {"key": (1, "string"), "value": (2, "TensorInfo")},
        "SignatureDef": {"inputs": (1, "Tensors*"), "outputs": (2, "Tensors*")},
        "Signatures": {"key": (1, "string"), "value": (2, "SignatureDef")},
        "MetaGraphDef": {"signature_def": (5, "Signatures*")},
    }
    file = descriptor_pb2.FileDescriptorProto(name="meta_graph", package="etfzoo", syntax="proto3")
    for message, fields in messages.items():
        described = file.message_type.add(name=message)
        for name, (number, kind) in fields.items():
            field = described.field.add(name=name, number=number)
            field.label = field.LABEL_REPEATED if kind.endswith("*") else field.LABEL_OPTIONAL
            if kind.strip("*") in messages:
                field.type, field.type_name = field.TYPE_MESSAGE, f".etfzoo.{kind.strip('*')}"
            else:
                field.type = getattr(field, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    described = pool.FindMessageTypeByName("etfzoo.MetaGraphDef")
    parsed = message_factory.GetMessageClass(described).FromString(meta_graph)

    def tensors(pairs):
        return {
            p.key: (
                p.value.name,
                "string" if p.value.dtype == STRING else DTYPES[p.value.dtype],
                None if p.value.shape.unknown_rank else [d.size for d in p.value.shape.dim],
            )
            for p in pairs
        }

    return {
        pair.key: {
            "inputs": tensors(pair.value.inputs),
            "outputs": tensors(pair.value.outputs),
        }
        for pair in parsed.signature_def
        if not pair.key.startswith("__")  # how TensorFlow marks its init op
    }


def _serve(folder):
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get in between

    def send(answer):
        pickle.dump(answer, answers)
        answers.flush()

    try:
        session = _Session(folder)
    except StatusError as error:
        return send(error)
    send((session.signatures, sorted({name.partition(".")[0] for name in sys.modules})))
    while True:
        try:
            name, inputs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return None
        try:
            send(session.run(name, inputs))
        except StatusError as error:
            send(error)


if __name__ == "__main__":
    # What is unpickled is the Loader's: this module under its own name.
    sys.modules["c_api"] = sys.modules["__main__"]
    StatusError.__module__ = "c_api"
    _serve(sys.argv[1])
