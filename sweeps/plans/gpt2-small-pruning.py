"""Edge Pruning of GPT-2 small: 3,000 steps of 32 examples of 64 tokens, float32"""

from models.transformers_model import TransformersModel
from sweeps.plans._pruning import extras, pruning

model = TransformersModel(architecture="gpt2", num_layers=12, num_heads=12, width=768)
experiment = pruning(model, vocabulary=50_257, batch=32, length=64, steps=3_000, examples=10_000, precision="float32")
plan_extras = extras("fast", embeddings=("tok_embeds", "pos_embeds"))
