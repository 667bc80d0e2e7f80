"""Edge Pruning of CodeLlama-13B in the fast form: 6,000 steps of 32 examples of 72 tokens"""

from sweeps.plans._pruning import codellama, extras

experiment = codellama(num_layers=40, num_heads=40, width=5120, mlp_width=13824)
plan_extras = extras("fast", embeddings=())
