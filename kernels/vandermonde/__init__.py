from seqzoo.kernels.vandermonde.op import vandermonde as vandermonde
