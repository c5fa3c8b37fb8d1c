"""From observations to kept experts, and from a checkpoint to a smaller one.

methods         the criteria; counts: what --keep-experts, --compression and --kept mean
weight_scores   a criterion without observations
protection      experts that stay whatever they score
select          which experts are kept
given_kept      or the map that the user gave
history         what was pruned before
coverage        whether the observations are enough; inspection, usage: what they and a bundle say

view            the pruned model, read from its source; replaced: with new weights
quantization    its `quantization_config`
write           its safetensors
layer_files     new weights of experts, a file per layer; layer_facts: what is kept beside them
"""
