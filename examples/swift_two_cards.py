"""One model on two GPUs, with the calls of ms-swift's vLLM guide.

    python examples/swift_two_cards.py [MODEL_TYPE]

Without GPUs two processes share the CPU and hold half of the model each. A private cluster is started, and
ends with the program.
"""

import os
import sys

# As with ms-swift, these count when they are set before the engine is made.
os.environ["CUDA_VISIBLE_DEVICES"] = "0,1"
os.environ.setdefault("MODELSCOPE_CACHE", os.path.expanduser("~/.cache/modelscope"))

from pagoda.swift import ModelType, get_default_template_type, get_template, get_vllm_engine, inference_vllm

model_type = sys.argv[1] if len(sys.argv) > 1 else ModelType.smollm2_135m_instruct
engine = get_vllm_engine(model_type, tensor_parallel_size=2)
template = get_template(get_default_template_type(model_type), engine.hf_tokenizer)
engine.generation_config.max_new_tokens = 64
engine.generation_config.temperature = 0

requests = [{"query": "What is the capital of France?"}, {"query": "Name three primary colours."}]
for request, response in zip(requests, inference_vllm(engine, template, requests), strict=True):
    print(f"query: {request['query']}")
    print(f"response: {response['response']}")
