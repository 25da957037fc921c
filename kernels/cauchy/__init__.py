from seqzoo.kernels.cauchy.op import cauchy as cauchy
