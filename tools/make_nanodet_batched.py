"""Gives the shipped NanoDet-g a free batch axis: `python tools/make_nanodet_batched.py SOURCE [TARGET]`.

SOURCE is the converted file with its batch axis fixed at 1. TARGET defaults to the packaged file. Converting a file
twice gives the same bytes.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from skimage import data
from skimage.color import gray2rgb

from shards.detect.nanodet import MODEL_FILE, SIDE_PX, preprocess
from uniemox_dist.core.files import atomic_path

SHIPPED = Path(__file__).resolve().parents[1] / "shards" / "detect" / "weights" / MODEL_FILE
PICTURES = ("astronaut", "coffee", "rocket", "chelsea", "hubble_deep_field", "retina", "colorwheel", "camera")
BATCHES = (1, 3, 8)
MAX_DIFFERENCE = 1e-5  # scores are 0..1, bins are logits; boxes are written with five decimals


def free_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network with a first axis `batch` on its input and outputs."""
    freed = onnx.ModelProto()
    freed.CopyFrom(model)
    graph = freed.graph
    constants = {constant.name: constant for constant in graph.initializer}
    sides = {info.name: info.type.tensor_type.shape.dim[-1].dim_value for info in graph.value_info}
    producers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "Reshape":
            shape = numpy_helper.to_array(constants[node.input[1]]).copy()
            shape[0] = 0  # ONNX: the axis keeps its size
            constants[node.input[1]].CopyFrom(numpy_helper.from_array(shape, node.input[1]))
        elif node.op_type == "Resize" and len(node.input) == 4:
            # Its target is N, C (computed) and H, W (constants); the runtime's fast kernels want fixed scales.
            target = numpy_helper.to_array(constants[producers[node.input[3]].input[1]])
            scales = np.array([1, 1, *target / sides[node.input[0]]], np.float32)
            graph.initializer.append(numpy_helper.from_array(scales, f"{node.output[0]}/scales"))
            node.input[2:] = [graph.initializer[-1].name]
    drop_unused(graph)
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del graph.value_info[:]  # they state batch 1; the runtime infers them again
    onnx.checker.check_model(freed, full_check=True)
    return freed


def drop_unused(graph: onnx.GraphProto) -> None:
    """Deletes nodes and constants that nothing reads."""
    used = {output.name for output in graph.output}
    for node in reversed(list(graph.node)):  # nodes come in order of use
        if used.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            used.update(node.input)
    for constant in [constant for constant in graph.initializer if constant.name not in used]:
        graph.initializer.remove(constant)


def run(weights: bytes, x: np.ndarray) -> dict[str, np.ndarray]:
    """All outputs by name, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(weights, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: x})))


def largest_difference(original: bytes, freed: bytes, x: np.ndarray, batch: int) -> float:
    """Largest difference between `freed` on the first `batch` pictures together and `original` on each alone."""
    together = run(freed, x[:batch])
    alone = [run(original, x[i : i + 1]) for i in range(batch)]
    return max(
        float(np.abs(values - np.concatenate([outputs[name] for outputs in alone])).max())
        for name, values in together.items()
    )


def main(source: Path, target: Path = SHIPPED) -> None:
    original = source.read_bytes()
    freed = free_batch(onnx.load_from_string(original)).SerializeToString(deterministic=True)
    x = np.empty((len(PICTURES), 3, SIDE_PX, SIDE_PX), np.float32)
    for x_CHW, name in zip(x, PICTURES):
        preprocess(gray2rgb(getattr(data, name)()), out=x_CHW)
    for batch in BATCHES:
        difference = largest_difference(original, freed, x, batch)
        print(f"batch {batch}: largest difference from single pictures {difference:.1e}")
        if difference > MAX_DIFFERENCE:
            sys.exit(f"more than {MAX_DIFFERENCE:.0e}; nothing written")
    with atomic_path(target) as temporary:
        temporary.write_bytes(freed)
    print(f"{target}: {len(freed):,} bytes, SHA-256 {hashlib.sha256(freed).hexdigest()}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python tools/make_nanodet_batched.py SOURCE [TARGET]")
    main(*map(Path, sys.argv[1:]))
