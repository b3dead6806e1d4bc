package snapbroker

// The calls, from a caller's arguments: the same for a client and for a batch.

func prepareCall(key, parent string, given []PrepareOption) (*call, callOptions) {
	var o callOptions
	for _, option := range given {
		option.applyPrepare(&o)
	}
	return &call{verb: verbPrepare, key: key, parent: parent, labels: o.labels.sorted()}, o
}

func viewCall(key, parent string, given []ViewOption) *call {
	var o callOptions
	for _, option := range given {
		option.applyView(&o)
	}
	return &call{verb: verbView, key: key, parent: parent, labels: o.labels.sorted()}
}

func commitCall(name, key string, given []CommitOption) (*call, callOptions) {
	var o callOptions
	for _, option := range given {
		option.applyCommit(&o)
	}
	return &call{
		verb: verbCommit, name: name, key: key, parent: o.parent, labels: o.labels.sorted(), sync: o.sync, fence: o.fence,
	}, o
}

func removeCall(key string, given []RemoveOption) *call {
	var o callOptions
	for _, option := range given {
		option.applyRemove(&o)
	}
	return &call{verb: verbRemove, key: key, fence: o.fence}
}

func mountsCall(key string, given []MountsOption) *call {
	var o callOptions
	for _, option := range given {
		option.applyMounts(&o)
	}
	return &call{verb: verbMounts, key: key, fence: o.fence}
}

func updateCall(name string, labels Labels, fieldpaths []string) *call {
	return &call{verb: verbUpdate, name: name, labels: labels.sorted(), fieldpaths: fieldpaths}
}

func usageCall(key string, given []UsageOption) (*call, callOptions) {
	var o callOptions
	for _, option := range given {
		option.applyUsage(&o)
	}
	return &call{verb: verbUsage, key: key}, o
}
