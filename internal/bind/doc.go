// Package bind tells whether addresses are free to listen at and, where one is not, which process has it.
package bind
