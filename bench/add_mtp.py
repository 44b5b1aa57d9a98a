"""Put a trained head of multi-token prediction behind the blocks of a Qwen3.5 GGUF file.

python add_mtp.py -m MODEL.gguf --head OUT/mtp.npz [--counts OUT/counts.npy --frequent 2048] -o WITH_HEAD.gguf

`train_mtp.py` writes both inputs. Matrices become q8_0, vectors stay float32; everything else is copied as it is. With
`--counts`, the file lists the most frequent tokens (`nextn_draft_tokens`): the head then scores these alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import quantize


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--head", type=Path, required=True)
    parser.add_argument("--counts", type=Path)
    parser.add_argument("--frequent", type=int, default=2048)
    parser.add_argument("-o", "--output", type=Path, required=True)
    a = parser.parse_args()
    reader = GGUFReader(a.model)
    name = str(reader.fields["general.architecture"].contents())
    if f"{name}.nextn_predict_layers" in reader.fields:
        parser.error(f"{a.model} has a head")
    n_blocks = int(reader.fields[f"{name}.block_count"].contents())
    writer = GGUFWriter(a.output, name)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", f"{name}.block_count"):
            continue
        more = {"sub_type": field.types[-1]} if field.types[0] == GGUFValueType.ARRAY else {}
        writer.add_key_value(field.name, field.contents(), field.types[0], **more)
    writer.add_block_count(n_blocks + 1)
    writer.add_uint32(f"{name}.nextn_predict_layers", 1)
    if a.counts is not None:
        order = np.argsort(-np.load(a.counts), kind="stable")[: a.frequent]
        writer.add_key_value(
            f"{name}.nextn_draft_tokens", np.sort(order).tolist(), GGUFValueType.ARRAY, sub_type=GGUFValueType.UINT32
        )
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for part, values in np.load(a.head).items():
        values = values.astype(np.float32)
        if values.ndim == 2:
            packed = quantize(values, GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"blk.{n_blocks}.{part}", packed, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"blk.{n_blocks}.{part}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
