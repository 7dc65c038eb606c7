"""A conversation: each answer's history is given back with the next question.

python examples/swift_history.py [MODEL_TYPE]
"""

import sys

from pagoda.swift import ModelType, get_default_template_type, get_template, get_vllm_engine, inference_vllm

model_type = sys.argv[1] if len(sys.argv) > 1 else ModelType.smollm2_135m_instruct
engine = get_vllm_engine(model_type)
template = get_template(get_default_template_type(model_type), engine.hf_tokenizer)
engine.generation_config.max_new_tokens = 64
engine.generation_config.temperature = 0

history: list = []
for query in ("What is the capital of France?", "And the capital of Spain?", "Which of the two is larger?"):
    (response,) = inference_vllm(engine, template, [{"query": query, "history": history}])
    history = response["history"]
    print(f"query: {query}\nresponse: {response['response']}")
print(f"history: {history}")
