{{- /*
SPDX-FileCopyrightText: The sglang_weight_exporter authors
SPDX-License-Identifier: Apache-2.0
*/ -}}

{{- define "weights.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) -}}
{{- default $full .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- /* Metadata of an object: (list $ section-of-values name-suffix). */ -}}
{{- define "weights.metadata" -}}
{{- $root := index . 0 -}}
{{- $section := index . 1 -}}
{{- $namespace := default $root.Release.Namespace $section.namespace }}
{{- /* Releases of the same name in two namespaces may put their objects into one. */}}
{{- $from := eq $namespace $root.Release.Namespace | ternary "" (printf "-%s" $root.Release.Namespace) }}
name: {{ include "weights.fullname" $root }}{{ $from }}{{ index . 2 }}
namespace: {{ $namespace }}
labels:
  {{- $ours := dict
      "helm.sh/chart" (printf "%s-%s" $root.Chart.Name $root.Chart.Version)
      "app.kubernetes.io/name" (default $root.Chart.Name $root.Values.nameOverride)
      "app.kubernetes.io/instance" $root.Release.Name
      "app.kubernetes.io/version" $root.Chart.AppVersion
      "app.kubernetes.io/managed-by" $root.Release.Service }}
  {{- merge dict (default dict $section.labels) $root.Values.commonLabels $ours | toYaml | nindent 2 }}
{{- with $section.annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
