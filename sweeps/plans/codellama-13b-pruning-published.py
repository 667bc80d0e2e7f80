"""The same of CodeLlama-13B in the published form (there: 32 GPUs of 80 GB, FSDP with CPU offload, at most 35 hours)"""

from sweeps.plans._pruning import codellama, extras

experiment = codellama(num_layers=40, num_heads=40, width=5120, mlp_width=13824)
plan_extras = extras("published", embeddings=())
