#!/usr/bin/env bash
# onnxruntime 1.32.0: calibration by entropy, as quantize_static() sets it up, gives the ranges of MinMax.
#
# Expected: CalibrationMethod.Entropy cuts off what few values reach, and ends nearer to most of them than MinMax.
# Happens: every scale is MinMax's, with one value of 100 among 12,000 of a normal distribution, too. Its histogram has
#   128 bins, as many as the quantised one, so there is one candidate alone: all of them. No option of quantize_static()
#   sets these numbers. Percentile cuts off, if CalibPercentile is below its 99.999.
# Here: mnv2_fused/tools/int8_engines.py calibrates ONNX Runtime by MinMax.
# Takes some 100 MB and a minute. Exits with 1 where onnxruntime behaves otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2 numpy==2.2.6
cat > "$folder/show.py" <<'PYTHON'
import logging
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

logging.disable(logging.WARNING)
folder = Path(sys.argv[1])
draw = np.random.default_rng(0)
images = [draw.standard_normal((1, 3, 16, 16)).astype(np.float32) for _ in range(16)]
images[0][0, 0, 0, 0] = 100

weight = numpy_helper.from_array(draw.standard_normal((8, 3, 3, 3)).astype(np.float32), "w")
nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), helper.make_node("Relu", ["c"], ["y"])]
x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])
y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 14, 14])
graph = helper.make_graph(nodes, "g", [x], [y], [weight])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
onnx.checker.check_model(model)
onnx.save(model, folder / "float.onnx")


class Images(CalibrationDataReader):
    def __init__(self):
        self.left = iter(images)

    def get_next(self):
        image = next(self.left, None)
        return None if image is None else {"x": image}


def scales(method, **options):
    quantize_static(
        folder / "float.onnx",
        folder / "int8.onnx",
        Images(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=method,
        extra_options=options,
    )
    found = {t.name: numpy_helper.to_array(t) for t in onnx.load(folder / "int8.onnx").graph.initializer}
    return {name: float(t) for name, t in found.items() if name.endswith("_scale") and t.size == 1}


minmax, entropy = scales(CalibrationMethod.MinMax), scales(CalibrationMethod.Entropy)
percentile = scales(CalibrationMethod.Percentile, CalibPercentile=99.9)
print(f"scale of x: MinMax {minmax['x_scale']:.4f}, Entropy {entropy['x_scale']:.4f}, Percentile {percentile['x_scale']:.4f}")
sys.exit(not (minmax == entropy and percentile["x_scale"] < minmax["x_scale"] / 2))
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/show.py" "$folder" | grep "scale of"
