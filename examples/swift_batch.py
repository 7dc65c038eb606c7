"""Several questions at once, with the calls of ms-swift's vLLM guide.

    python examples/swift_batch.py [MODEL_TYPE]

Runs as it is: a private cluster is started, and ends with the program. With PAGODA_URL=host:port it asks a
server that runs already (`pagoda serve`, `pagoda deploy`).
"""

import os
import sys

# As with ms-swift, these count when they are set before the engine is made. Without a GPU the CPU is used.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
os.environ.setdefault("MODELSCOPE_CACHE", os.path.expanduser("~/.cache/modelscope"))

from pagoda.swift import ModelType, get_default_template_type, get_template, get_vllm_engine, inference_vllm

model_type = sys.argv[1] if len(sys.argv) > 1 else ModelType.smollm2_135m_instruct
engine = get_vllm_engine(model_type)
template = get_template(get_default_template_type(model_type), engine.hf_tokenizer)
engine.generation_config.max_new_tokens = 64
engine.generation_config.temperature = 0

requests = [
    {"query": "What is the capital of France?"},
    {"query": "Name three primary colours."},
    {"query": "Say hello.", "system": "You answer in one word."},
]
generation_info: dict = {}
responses = inference_vllm(engine, template, requests, generation_info=generation_info)
for request, response in zip(requests, responses, strict=True):
    print(f"query: {request['query']}")
    print(f"response: {response['response']}")
print(generation_info)
