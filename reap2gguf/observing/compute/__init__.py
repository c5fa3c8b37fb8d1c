"""How a layer is computed: experts, kernels, the threads of a CPU, several processes."""
