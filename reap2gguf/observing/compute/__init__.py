"""How a layer is computed: experts, kernels, threads of a CPU, several processes."""
