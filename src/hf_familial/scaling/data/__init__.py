"""Where rows come from: tables and files, their columns, or a simulation."""
