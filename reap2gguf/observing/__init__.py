"""Runs calibration rows through a model and sums what its layers compute.

The words of this folder:

- sweep: one pass of all rows through all decoder layers, one layer after another, so that only one
  layer's weights are in memory. Messages to users call it a calibration pass.
- row: one sequence of tokens. Batch: rows that are computed together. Position: one token of a
  batch, or padding.
- hidden states: what enters or leaves a layer, one vector per position. Messages call them
  activations.
- spool: where the hidden states of all rows wait between two layers: in GPU memory, RAM or a file.
- observer: what sums the values of one layer, for REAP or for an importance matrix.
- state: a file from which an interrupted sweep resumes.
- probe: rows that no observer counts. They pass through the layers so that the predictions of a
  multi-token-prediction (MTP) block can be checked on them.

Read `passes` first, then `sweep`:

passes       the two passes: rows of tokens -> observations, or an importance matrix
sweep_plan   device, dtype, budget and batches of a sweep on this machine; allocator
sweep        all layers in order: batches, spool, state, warm_up of kernels
layer_group  a batch through neighbouring layers
decoder      the model of transformers with one layer in memory; recording, mtp, linear_attention
loader       weights of the next layer meanwhile: readers, and targets, the names of their bytes
observer     what watches a layer: saliency, importance (latents), joint
totals       the sums of all processes
narrowed     a layer with fewer experts, for what measures prunings
compute/     experts, kernels, threads and processes
"""
