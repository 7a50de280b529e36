package schema

import (
	"reflect"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestFieldsAreThoseOfTheForm: a field that the environment, the defaults and MANTLET_OVERRIDES=tighten do not know of would have no effect.
func TestFieldsAreThoseOfTheForm(t *testing.T) {
	want, got := map[string]string{}, map[string]string{}
	for _, f := range fields {
		want[f.path] = reflect.TypeOf(f.kind).String()
		if f.isList {
			want[f.path] = "[]" + want[f.path]
		}
	}
	var walk func(path string, form reflect.Type)
	walk = func(path string, form reflect.Type) {
		for _, f := range fieldsOf(form) {
			switch _, isList := lists[f.name]; {
			case isList && path == "":
			case f.form.Kind() == reflect.Struct:
				walk(path+f.name+".", f.form)
			case f.form.Kind() == reflect.Slice:
				got[path+f.name] = "[]" + f.form.Elem().String()
			default:
				got[path+f.name] = f.form.String()
			}
		}
	}
	walk("", reflect.TypeFor[fileForm]())
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for name, list := range lists {
		if key := fieldsOf(list.form)[0].name; key != list.key {
			t.Errorf("the key of %s is %s, and the form's first field, which names an entry in problems, is %s", name, list.key, key)
		}
	}
}
