from seqzoo.kernels.matrix_scan.op import matrix_scan as matrix_scan
from seqzoo.kernels.matrix_scan.op import row_power as row_power
