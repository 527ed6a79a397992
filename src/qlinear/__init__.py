"""qlinear: quantizes the linear layers of transformer checkpoints, and says what it cost.

The rooms, from the bottom of the house to the top; a module imports from its own room and from those before it:

    runtime/        what the machine gives: device, distributed, memory, threads
    formats/        what a number means, and for which weights: scheme, scales, rounding, finite, packing, name_patterns
    ops/            kernels behind one signature, the only room that knows the hardware: reference, cpu_int8,
                    onednn_product, torch_int4, weight_only, fused_quantize, pack_cache
    nn/             the layer as modules: qlinear, linear_state, qat, norms, smoothed_linear, tensor_parallel,
                    activation_range, encoder_fast_path
    data/           calibration and evaluation text as token ids: rows, sources, tokens
    demo/           the embedded model and its text:
    algorithms/     tensors in, codes out, one file per algorithm: base, rtn, gptq, awq, smoothquant,
                    alpha_search, parts
    checkpoint/     files only: reader, writer, safetensors_header, torch_bin, output_dir, replace_dir, checksums,
                    dequantized_view,
                    layouts
    streaming/      a checkpoint as a model with one block in memory: streamed_model, lanes, find_blocks, spill,
                    prefetch, buffer_pool, meta_model, weight_map, hf_conversion, open_model, random_weights,
                    plain_linear, float32, diagnose
    tracing/        who feeds whom in a block, found by running it and proved: trace, experiment, folds, find_folds,
                    proof, on_meta
    calibration/    statistics of what weights read: stats, collect, stats_file
    pipeline/       the job, and what happens to one block: options, select_layers, float_modules, check_weights,
                    run, loop, lane_sets, block, quantize_block, fold_check, smooth_block, smoothing, group_statistics,
                    quantize_groups, rounded_inputs, refine_block, propagate, output
    api/            one file per public function, which is one command: quantize, calibrate, evaluate, inspect, convert,
                    load, generate, dry_run, quantize_module
    integrations/   other libraries that load our checkpoints, each registered once it is imported: on_import,
                    transformers, find_layers, load_operations, vllm, vllm_linear, vllm_lmdeploy
    cli/            the command line: app, options, make_commands, measure_commands, commands, display

Three modules stand alone: errors (the exception tree), functional (the layer as pure functions) and smooth (the public
name of SmoothQuant's two functions).
"""

from .api.convert import convert
from .api.evaluate import evaluate
from .api.inspect import inspect
from .api.load import load
from .api.quantize import quantize
from .api.quantize_module import quantize_
from .errors import QLinearError
from .formats.scheme import Scheme, TensorFormat
from .integrations import connect

connect()

__all__ = [
    "QLinearError",
    "Scheme",
    "TensorFormat",
    "convert",
    "evaluate",
    "inspect",
    "load",
    "quantize",
    "quantize_",
]
