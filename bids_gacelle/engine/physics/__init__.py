"""Signal physics shared by the models: exchange, powder averages, steady states."""
