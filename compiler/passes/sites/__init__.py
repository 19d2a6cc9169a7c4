"""Over a graph with markers: the value of every site becomes what the plan says of it, and the markers go."""
