from seqzoo.kernels.block_recurrence.op import block_recurrence as block_recurrence
