from seqzoo.kernels.selective_scan.op import selective_scan as selective_scan
