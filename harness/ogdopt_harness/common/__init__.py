"""What every package uses: files, journals, tables, sources of rows, the processes of a run."""
