"""Edge Pruning of CodeLlama-7B in the fast form: 6,000 steps of 32 examples of 72 tokens"""

from sweeps.plans._pruning import codellama, extras

experiment = codellama(num_layers=32, num_heads=32, width=4096, mlp_width=11008)
plan_extras = extras("fast", embeddings=())
