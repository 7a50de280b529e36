// Package rundir is the layout of the runtime directory: it alone knows the names of files, and which part of the directory is whose.
// It gives paths, and looks at no file but in AdminSockets.
package rundir
