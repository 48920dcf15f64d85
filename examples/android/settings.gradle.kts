pluginManagement {
    repositories {
        google()
        mavenCentral()
        gradlePluginPortal()
    }
}
dependencyResolutionManagement {
    repositories {
        google()
        mavenCentral()
        mavenLocal() // lime_edge's own jars: mvn -f runtimes/kotlin install -DskipTests
    }
}
rootProject.name = "lime-edge-example"
include(":app")
