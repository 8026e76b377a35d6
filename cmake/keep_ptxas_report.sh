#!/bin/sh
# keep_ptxas_report.sh OBJECT COMMAND...: run the compiler and keep what it says (nvcc -Xptxas -v) beside the object.
# The report of a good compilation is not printed: it has several lines per kernel.
object=$1
shift
if "$@" >"$object.ptxas.tmp" 2>&1; then
  mv "$object.ptxas.tmp" "$object.ptxas"
  grep -i -A3 'warning' "$object.ptxas" >&2
  exit 0
else
  status=$?
  cat "$object.ptxas.tmp" >&2
  rm -f "$object.ptxas.tmp" "$object.ptxas"
  exit $status
fi
