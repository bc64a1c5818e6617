"""What a model, its drafter and their KV need on given hardware, before anything is downloaded."""
