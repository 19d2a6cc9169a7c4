"""Over all rows together: sums are stored as one, values leave the loop, and linear maps of one input are one."""
